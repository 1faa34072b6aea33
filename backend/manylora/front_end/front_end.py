"""What both Triton models do with a request, without Triton: read it, tokenise it, send it to the engine.

Short prompts are read and tokenised on the caller's thread, long ones on a thread of their own: the caller is
Triton's one thread for all requests, and a prompt of a megabyte takes it a second. So are long parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from manylora import token_checks
from manylora.errors import InvalidArgumentError, ManyloraError, UnavailableError
from manylora.front_end import protocol
from manylora.front_end.call import Call, Responder, Row
from manylora.front_end.long_prompts import LongPrompts
from manylora.front_end.protocol import Prompt
from manylora.front_end.reply_loop import Lost, Refused, ReplyLoop, public_error
from manylora.front_end.text import Tokenizer
from manylora.front_end.text_stream import TextStream
from manylora.front_end.tokenising import (
    check_size,
    echo,
    size_of,
    size_of_parameters,
    size_of_tensors,
    tokenise,
)
from manylora.ipc import EngineConnection
from manylora.messages import Cancel, EngineInfo, Failed, Generate
from manylora.supervise.health import Stage

LONG_BYTES = 8192
"""Of a request, its prompts and parameters, above which it is read and tokenised apart: some 10 ms."""


@dataclass(kw_only=True, slots=True)
class _Job:
    """A request that is to be read, tokenised and sent."""

    tensors: Mapping[str, npt.NDArray[Any]]
    parameters_json: str
    arrived_s: float
    info: EngineInfo
    tokenizer: Tokenizer
    call: Call
    """Its rows are filled with the prompts."""
    prompts: Sequence[Prompt] = ()
    """Filled by `_read`."""


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
        self._long = LongPrompts(self._start)

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

    @property
    def stages(self) -> dict[str, Stage]:
        """The loops that serve, for `HealthSocket`."""
        return {"replies": self._replies.stage}

    def submit(
        self,
        responder: Responder,
        tensors: Mapping[str, npt.NDArray[Any]],
        parameters_json: str,
        arrived_s: float,
    ) -> None:
        """Begin a request. Never raises: whatever is wrong goes to the responder.

        Args:
            arrived_s: on the monotonic clock; deadlines count from it.
        """
        try:
            self._begin(responder, tensors, parameters_json, arrived_s)
        except BaseException as error:
            self.refuse(responder, public_error(responder, error))

    def refuse(self, responder: Responder, error: ManyloraError) -> None:
        """End a request that is not begun."""
        self._replies.put(Refused(responder, error))

    def close(self) -> None:
        """Fail what is in flight with UNAVAILABLE and end all threads."""
        self._replies.close()
        self._long.close()
        self._connection.close()

    def _begin(
        self,
        responder: Responder,
        tensors: Mapping[str, npt.NDArray[Any]],
        parameters_json: str,
        arrived_s: float,
    ) -> None:
        num_sequences = protocol.count_sequences(tensors)
        num_bytes = size_of_parameters(tensors, parameters_json)
        info, tokenizer = self._connection.info, self._tokenizer
        if info is None or tokenizer is None:
            raise UnavailableError("the engine is not running; try again in a while")
        if self._is_streaming and num_sequences != 1:
            raise InvalidArgumentError(
                f"got a batch of {num_sequences} sequences; a stream is for 1, send each by itself"
            )
        # Until it is read, a row has what its call needs to end.
        rows = [Row(id=next(self._ids), stream=TextStream(tokenizer)) for _ in range(num_sequences)]
        job = _Job(
            tensors=tensors,
            parameters_json=parameters_json,
            arrived_s=arrived_s,
            info=info,
            tokenizer=tokenizer,
            call=Call(responder, rows),
        )
        if num_bytes > LONG_BYTES:
            num_bytes += size_of_tensors(tensors)
        else:
            _read(job)
            num_bytes += sum(map(size_of, job.prompts))
        is_long = num_bytes > LONG_BYTES
        if is_long:
            self._long.require_room(num_bytes)
        # The call goes first: it is looked after while it waits, and events find it. From here on its errors
        # go the way of its events.
        self._replies.put(job.call)
        if is_long:
            self._long.put(job, num_bytes, arrived_s)
        else:
            self._start(job)

    def _start(self, job: _Job) -> None:
        """Tokenise a call's prompts, read before or not, and send them to the engine. Never raises."""
        call = job.call
        try:
            if call.has_ended:
                return
            if not job.prompts:
                _read(job)
            messages = []
            for row, prompt in zip(call.rows, job.prompts, strict=True):
                if call.has_ended:
                    return
                messages.append(_message(row, prompt, tokenise(prompt, job.tokenizer, job.info)))
                if prompt.echo:
                    row.new_text.append(echo(prompt, messages[-1].input_ids, job.tokenizer))
            for message in messages:
                self._connection.send(message)
            if call.has_ended:
                # It may have ended, and its sequences been cancelled, before they were sent.
                for message in messages:
                    self._connection.send(Cancel(message.id))
        except BaseException as error:  # a tokenizer's panic is no Exception
            failure = public_error(call.responder, error)
            self._replies.put([Failed(row.id, failure.code, failure.message) for row in call.rows])


def _read(job: _Job) -> None:
    """Read a request's parameters, and look at the sizes of its prompts."""
    prompts = protocol.decode(job.tensors, job.parameters_json)
    for prompt in prompts:
        check_size(prompt, job.tokenizer, job.info)
        token_checks.check_stop_token_ids(prompt.params, job.info)
    # At one stroke: the reply loop may be looking at them.
    job.call.rows[:] = [
        _row(row.id, prompt, job.tokenizer, job.arrived_s)
        for row, prompt in zip(job.call.rows, prompts, strict=True)
    ]
    job.prompts = prompts


def _row(row_id: int, prompt: Prompt, tokenizer: Tokenizer, arrived_s: float) -> Row:
    return Row(
        id=row_id,
        stream=TextStream(
            tokenizer, stop=prompt.stop, min_tokens=prompt.params.min_tokens, continues=prompt.echo
        ),
        logprobs_tokenizer=tokenizer if prompt.params.logprobs else None,
        deadline_ms=prompt.deadline_ms,
        deadline_s=arrived_s + prompt.deadline_ms / 1000 if prompt.deadline_ms else math.inf,
    )


def _message(row: Row, prompt: Prompt, input_ids: list[int]) -> Generate:
    row.num_input_tokens = len(input_ids)
    return Generate(
        id=row.id,
        input_ids=input_ids,
        adapter_id=prompt.adapter_id,
        adapter_scale=prompt.adapter_scale,
        priority=prompt.priority,
        deadline_ms=prompt.deadline_ms,
        deadline_s=row.deadline_s if prompt.deadline_ms else 0.0,
        params=prompt.params,
    )
