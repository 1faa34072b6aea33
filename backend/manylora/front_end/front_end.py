"""The engine for front doors: prompts in through `submit`, answers out through a `Responder`.

All front doors share it. Triton's models are one of them; everything specific to Triton is in `tensor_door`
and `triton_model`.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora import token_checks
from manylora.errors import InvalidArgumentError, ManyloraError, UnavailableError
from manylora.front_end.answer import GrowingAnswer, new_answer
from manylora.front_end.call import Call
from manylora.front_end.long_prompts import LongPrompts
from manylora.front_end.prompt import Prompt, UnreadRequest
from manylora.front_end.reply_loop import Lost, Refused, ReplyLoop, public_error
from manylora.front_end.responder import Responder
from manylora.front_end.text import Tokenizer
from manylora.front_end.text_stream import TextStream
from manylora.front_end.tokenising import check_size, echo, size_of, tokenise
from manylora.ipc import EngineConnection
from manylora.messages import Cancel, EngineInfo, Failed
from manylora.supervise.health import Stage

LONG_BYTES = 8192
"""A request with more text, or other content that costs as much to read, is parsed and tokenised on another
thread. This much takes some 10 ms."""


class _Read:
    """A request whose prompts have been parsed."""

    parsing_cost = num_content_bytes = 0

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self.num_prompts = len(prompts)

    def read(self) -> Sequence[Prompt]:
        return self._prompts


@dataclass(kw_only=True, slots=True)
class _Job:
    """A request on its way to the engine."""

    request: UnreadRequest
    arrived_s: float
    info: EngineInfo
    tokenizer: Tokenizer
    call: Call
    """`_read` fills its answers in."""
    prompts: Sequence[Prompt] = ()
    """Filled by `_read`."""


class FrontEnd:
    """Serves requests through the engine behind a socket.

    `submit`, `submit_unread` and `refuse` are thread-safe and return soon: a request of up to `LONG_BYTES` is
    tokenised on the caller's thread, which takes some 10 ms at most; a longer one on another thread, since
    the caller is often one thread for all requests. All replies come from one further thread (see
    `Responder`). A request in flight needs no thread, only its state and a check of about a microsecond ten
    times a second, so there may be many thousands. The other methods are for the thread that owns the object.
    """

    def __init__(self, socket_path: Path) -> None:
        """Connect. `wait_ready` waits until requests can be served."""
        self._tokenizer: Tokenizer | None = None
        self._ids = itertools.count(1)
        self._replies = ReplyLoop(cancel=lambda id: self._connection.send(Cancel(id)))
        self._connection = EngineConnection(
            socket_path, on_events=self._replies.put, on_lost=lambda: self._replies.put(Lost())
        )
        self._long = LongPrompts(self._start)

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the engine answers, and read its tokenizer. False: it has not answered in time.

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
        self, prompts: Sequence[Prompt], responder: Responder, *, arrived_s: float | None = None
    ) -> None:
        """Begin a request of one sequence per prompt. Never raises: whatever is wrong goes to the responder.

        Args:
            arrived_s: on the monotonic clock; deadlines count from it. None: now.
        """
        self.submit_unread(_Read(prompts), responder, time.monotonic() if arrived_s is None else arrived_s)

    def submit_unread(self, request: UnreadRequest, responder: Responder, arrived_s: float) -> None:
        """Begin a request that has not been parsed yet. Never raises."""
        try:
            self._begin(request, responder, arrived_s)
        except BaseException as error:
            self.refuse(responder, public_error(responder, error))

    def refuse(self, responder: Responder, error: ManyloraError) -> None:
        """End a request that never began. Never raises."""
        self._replies.put(Refused(responder, error))

    def close(self) -> None:
        """Fail what is in flight with UNAVAILABLE and end all threads. What is submitted later fails too."""
        self._replies.close()
        self._long.close()
        self._connection.close()

    def _begin(self, request: UnreadRequest, responder: Responder, arrived_s: float) -> None:
        info, tokenizer = self._connection.info, self._tokenizer
        if info is None or tokenizer is None:
            raise UnavailableError("the engine is not running; try again in a while")
        if not request.num_prompts:
            raise InvalidArgumentError("got no prompts; send at least one")
        # Until its prompt is parsed, an answer has what its call needs to end.
        answers = [
            GrowingAnswer(id=next(self._ids), stream=TextStream(tokenizer))
            for _ in range(request.num_prompts)
        ]
        job = _Job(
            request=request,
            arrived_s=arrived_s,
            info=info,
            tokenizer=tokenizer,
            call=Call(responder, answers),
        )
        cost = request.parsing_cost
        if cost > LONG_BYTES:
            cost += request.num_content_bytes
        else:
            _read(job)
            cost += sum(map(size_of, job.prompts))
        is_long = cost > LONG_BYTES
        if is_long:
            self._long.reserve(cost)
        # The call goes first: its client is watched while it waits, and its events find it. From here on its
        # errors are reported as events.
        self._replies.put(job.call)
        if is_long:
            self._long.put(job, cost, arrived_s)
        else:
            self._start(job)

    def _start(self, job: _Job) -> None:
        """Tokenise a call's prompts, parsed by now or not, and send them to the engine. Never raises."""
        call = job.call
        try:
            if call.has_ended:
                return
            if not job.prompts:
                _read(job)
            messages = []
            for answer, prompt in zip(call.answers, job.prompts, strict=True):
                if call.has_ended:
                    return
                input_ids = tokenise(prompt, job.tokenizer, job.info)
                answer.num_input_tokens = len(input_ids)
                messages.append(prompt.message(answer.id, input_ids, answer.deadline_s))
                if prompt.echo:
                    answer.echo(echo(prompt, input_ids, job.tokenizer))
            for message in messages:
                self._connection.send(message)
            if call.has_ended:
                # It may have ended, and its sequences been cancelled, before they were sent.
                for message in messages:
                    self._connection.send(Cancel(message.id))
        except BaseException as error:  # a tokenizer's panic is not an Exception
            failure = public_error(call.responder, error)
            self._replies.put([Failed(answer.id, failure.code, failure.message) for answer in call.answers])


def _read(job: _Job) -> None:
    """Parse a request, and check the sizes of its prompts."""
    prompts = job.request.read()
    for prompt in prompts:
        check_size(prompt, job.tokenizer, job.info)
        token_checks.check_stop_token_ids(prompt.params, job.info)
    responder = job.call.responder
    format_logprobs = functools.partial(responder.format_logprobs, tokenizer=job.tokenizer)
    # All at once: the reply loop may be looking at them.
    job.call.answers[:] = [
        new_answer(answer.id, prompt, job.tokenizer, job.arrived_s, format_logprobs)
        for answer, prompt in zip(job.call.answers, prompts, strict=True)
    ]
    job.prompts = prompts
