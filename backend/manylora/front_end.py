"""What both Triton models do with a request, without Triton: read it, tokenise it, send it to the engine."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from manylora import protocol
from manylora.call import Call, Responder, Row
from manylora.errors import InvalidArgumentError, ManyloraError, UnavailableError
from manylora.ipc import EngineConnection
from manylora.messages import Cancel, EngineInfo, Failed, Generate
from manylora.protocol import Prompt
from manylora.reply_loop import Lost, Refused, ReplyLoop, public_error
from manylora.text import Tokenizer
from manylora.text_stream import TextStream


class FrontEnd:
    """Serves requests through the engine behind a socket. All methods are for one caller's thread."""

    def __init__(self, socket_path: Path, *, is_streaming: bool) -> None:
        """Connect. `wait_ready` says when requests can be served.

        Args:
            is_streaming: reply whenever there are new tokens; otherwise once, at the end.
        """
        self._is_streaming = is_streaming
        self._tokenizer: Tokenizer | None = None
        self._ids = itertools.count(1)
        self._replies = ReplyLoop(
            is_streaming=is_streaming, cancel=lambda id: self._connection.send(Cancel(id))
        )
        self._connection = EngineConnection(
            socket_path, on_events=self._replies.put, on_lost=lambda: self._replies.put(Lost())
        )

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the engine answers, and read its tokenizer. False: it does not answer yet.

        Raises:
            ManyloraError: the tokenizer cannot be served.
        """
        info = self._connection.wait_ready(timeout_s)
        if info is not None and self._tokenizer is None:
            self._tokenizer = Tokenizer.load(info.base_model)
        return info is not None

    @property
    def is_ready(self) -> bool:
        """Whether there is an engine now."""
        return self._tokenizer is not None and self._connection.info is not None

    def submit(
        self, responder: Responder, tensors: Mapping[str, npt.NDArray[Any]], parameters_json: str
    ) -> None:
        """Begin a request. Never raises: whatever is wrong goes to the responder."""
        arrived_s = time.monotonic()
        try:
            self._begin(responder, protocol.decode(tensors, parameters_json), arrived_s)
        except BaseException as error:  # a tokenizer's panic is no Exception
            self.refuse(responder, public_error(responder, error))

    def refuse(self, responder: Responder, error: ManyloraError) -> None:
        """End a request that is not begun."""
        self._replies.put(Refused(responder, error))

    def close(self) -> None:
        """Fail what is in flight with UNAVAILABLE and end all threads."""
        self._replies.close()
        self._connection.close()

    def _begin(self, responder: Responder, prompts: Sequence[Prompt], arrived_s: float) -> None:
        info, tokenizer = self._connection.info, self._tokenizer
        if info is None or tokenizer is None:
            raise UnavailableError("the engine is not running; try again in a while")
        if self._is_streaming and len(prompts) != 1:
            raise InvalidArgumentError(
                f"got a batch of {len(prompts)} sequences; a stream is for 1, send each by itself"
            )
        rows: list[Row] = []
        messages: list[Generate] = []
        for prompt in prompts:
            input_ids = _tokenise(prompt, tokenizer, info)
            message = _message(next(self._ids), prompt, input_ids, arrived_s)
            messages.append(message)
            rows.append(_row(message, prompt, tokenizer))
        # The call goes first, so that events find it. From here on its errors go the way of its events.
        self._replies.put(Call(responder, rows))
        try:
            for message in messages:
                self._connection.send(message)
        except BaseException as error:
            failure = public_error(responder, error)
            self._replies.put([Failed(row.id, failure.code, failure.message) for row in rows])


def _tokenise(prompt: Prompt, tokenizer: Tokenizer, info: EngineInfo) -> list[int]:
    texts = [prompt.text or ""] if prompt.messages is None else [m["content"] for m in prompt.messages]
    num_chars, max_chars = sum(map(len, texts)), info.max_model_len * tokenizer.max_token_chars
    if num_chars > max_chars:
        # Tokenising it would hold up everybody, to no end.
        raise InvalidArgumentError(
            f"the prompt has {num_chars} characters; allowed are below max_model_len={info.max_model_len} "
            f"tokens, which cannot be more than {max_chars} characters"
        )
    if prompt.messages is not None:
        input_ids = tokenizer.encode_chat(prompt.messages)
    elif prompt.text is not None:
        input_ids = tokenizer.encode(prompt.text)
    else:
        input_ids = prompt.input_ids or []
    protocol.check_input_ids(input_ids, info)
    return input_ids


def _message(row_id: int, prompt: Prompt, input_ids: list[int], arrived_s: float) -> Generate:
    return Generate(
        id=row_id,
        input_ids=input_ids,
        adapter_id=prompt.adapter_id,
        adapter_scale=prompt.adapter_scale,
        priority=prompt.priority,
        deadline_ms=prompt.deadline_ms,
        deadline_s=arrived_s + prompt.deadline_ms / 1000 if prompt.deadline_ms else 0.0,
        params=prompt.params,
    )


def _row(message: Generate, prompt: Prompt, tokenizer: Tokenizer) -> Row:
    stream = TextStream(
        tokenizer, stop=prompt.stop, min_tokens=prompt.params.min_tokens, continues=prompt.echo
    )
    row = Row(
        id=message.id,
        num_input_tokens=len(message.input_ids),
        stream=stream,
        logprobs_tokenizer=tokenizer if prompt.params.logprobs else None,
        deadline_ms=message.deadline_ms,
        deadline_s=message.deadline_s if message.deadline_ms else math.inf,
    )
    if prompt.echo:
        row.new_text.append(tokenizer.decode(message.input_ids) if prompt.text is None else prompt.text)
    return row
