"""The thread that answers: it owns all calls in flight and is the only one that sends replies.

Each turn takes everything that has come, then sends one reply for each call that has news. When sending lags
behind the engine, tokens of several steps therefore go out together.

A fault ends the call that it befalls; one of the loop itself ends all calls; neither ends the thread. It
catches BaseException for that: libraries written in Rust panic with one that is no Exception.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from manylora import errors
from manylora.errors import CancelledRequestError, InternalError, ManyloraError, UnavailableError
from manylora.front_end import protocol
from manylora.front_end.call import Call, Responder, Row
from manylora.ipc import Event
from manylora.messages import Failed
from manylora.supervise.health import Stage

log = logging.getLogger(__name__)

CHECK_S = 0.1
"""How often a call is asked whether its client is still there, which takes Triton 30 us, and its deadline is
looked at."""
DEADLINE_GRACE_S = 0.25
"""How long after a deadline the engine may say itself that it has passed. In a long step it does not."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that ends with an error before it became a call."""

    responder: Responder
    error: ManyloraError


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine has gone, and all calls with it."""


@dataclass(frozen=True, slots=True)
class _Closed:
    """Answer what is there and end."""


Note = Call | Refused | list[Event] | Lost | _Closed


class ReplyLoop:
    """Follows calls to their last reply. Every call gets exactly one, whatever happens."""

    def __init__(self, *, is_streaming: bool, cancel: Callable[[int], None]) -> None:
        """Start the thread.

        Args:
            is_streaming: reply whenever there are new tokens; otherwise once, at the end.
            cancel: frees a sequence in the engine; may raise ManyloraError when there is no engine.
        """
        self._is_streaming = is_streaming
        self._cancel = cancel
        self.stage = Stage()
        self._inbox: queue.SimpleQueue[Note] = queue.SimpleQueue()
        # Below: the thread's. Notes and news outlive a turn that a fault breaks off.
        self._notes: deque[Note] = deque()
        """Taken from the inbox, not followed yet."""
        self._news: dict[Call, None] = {}
        """Calls with something to say."""
        self._calls: dict[int, Call] = {}
        """By the ids of their sequences that have not ended."""
        self._check_at_s = 0.0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="manylora-reply", daemon=True)
        self._thread.start()

    def put(self, note: Call | Refused | list[Event] | Lost) -> None:
        """Hand over a note; from any thread. A call must come before its events."""
        self._inbox.put(note)

    def close(self) -> None:
        """Fail all calls with UNAVAILABLE and end the thread."""
        self._inbox.put(_Closed())
        self._thread.join()

    # From here on: the thread's own methods.

    def _run(self) -> None:
        while not self._is_closing:
            # What breaks even the recovery, such as want of memory, may be over at the next turn.
            with contextlib.suppress(BaseException):
                try:
                    self._take_notes()
                    with self.stage:
                        self._turn()
                except BaseException as error:
                    self._recover(error)
        self._fail_all(UnavailableError("the server is shutting down"))

    def _turn(self) -> None:
        while self._notes:
            note = self._notes.popleft()
            try:
                self._follow(note)
            except BaseException as error:
                self._recover(error, note)
        while self._news:
            call = next(iter(self._news))
            del self._news[call]
            try:
                self._reply(call)
            except BaseException as error:
                self._recover(error, call)
        if self._calls and time.monotonic() >= self._check_at_s:
            self._check_at_s = time.monotonic() + CHECK_S
            self._check_calls()

    def _take_notes(self) -> None:
        """Take all notes there are; wait for the first, but not past the next look at the calls."""
        timeout_s = max(0.001, self._check_at_s - time.monotonic()) if self._calls else None
        with contextlib.suppress(queue.Empty):
            if not self._notes:
                self._notes.append(self._inbox.get(timeout=timeout_s))
            while True:
                self._notes.append(self._inbox.get_nowait())

    def _follow(self, note: Note) -> None:
        if isinstance(note, Call):
            self._calls.update((row.id, note) for row in note.rows)
        elif isinstance(note, Refused):
            self._send_error(note.responder, note.error)
        elif isinstance(note, Lost):
            self._fail_all(UnavailableError("the engine has ended; try again in a while"))
        elif isinstance(note, _Closed):
            self._is_closing = True
        else:
            for event in note:
                call = self._calls.get(event.id)
                if call is not None:
                    self._take(call, event)

    def _take(self, call: Call, event: Event) -> None:
        """Apply one event."""
        if isinstance(event, Failed):
            self._fail(call, errors.from_code(event.code, event.message))
            return
        try:
            row = next(row for row in call.rows if row.id == event.id)
            row.take(event)
            if row.finish_reason:
                del self._calls[row.id]
                if not event.finish_reason:
                    self._stop_in_engine(row)
            if self._is_streaming or call.has_finished:
                self._news[call] = None
        except BaseException as error:
            self._fail(call, public_error(call.responder, error))

    def _reply(self, call: Call) -> None:
        try:
            outputs = protocol.encode([row.answer() for row in call.rows])
            call.responder.send(outputs, is_last=call.has_finished)
        except BaseException as error:
            self._fail(call, public_error(call.responder, error))

    def _check_calls(self) -> None:
        now_s = time.monotonic()
        for call in dict.fromkeys(self._calls.values()):
            try:
                error = _reason_to_end(call, now_s)
            except BaseException as fault:
                error = public_error(call.responder, fault)
            if error is not None:
                self._fail(call, error)

    def _recover(self, error: BaseException, note: Note | None = None) -> None:
        """End all calls, and the one in `note`, after a fault that may have struck any of them.

        A call may have had its last reply by then; its responder refuses another.
        """
        _log_fault(error, "the reply loop has failed; all its requests end with INTERNAL")
        failure = InternalError("internal error; the server's log has the reason")
        if isinstance(note, Call) and note not in self._calls.values():
            self._fail(note, failure)
        self._fail_all(failure)

    def _fail_all(self, error: ManyloraError) -> None:
        for call in dict.fromkeys([*self._news, *self._calls.values()]):
            if call.has_finished:
                # Its answer is whole and only waits to be sent.
                self._news.pop(call, None)
                self._reply(call)
            else:
                self._fail(call, error)

    def _fail(self, call: Call, error: ManyloraError) -> None:
        """End a call that has not had its last reply."""
        self._news.pop(call, None)
        call.has_ended = True
        try:
            for row in call.rows:
                if self._calls.pop(row.id, None) is not None:
                    self._stop_in_engine(row)
        finally:
            # Of a call that is known no more, nobody else would think.
            self._send_error(call.responder, error)

    def _stop_in_engine(self, row: Row) -> None:
        try:
            self._cancel(row.id)
        except ManyloraError:
            # Without an engine there is nothing to stop.
            return
        except BaseException as error:
            _log_fault(error, "sequence %d could not be cancelled", row.id)

    def _send_error(self, responder: Responder, error: ManyloraError) -> None:
        try:
            responder.fail(error)
        except BaseException as fault:
            _log_fault(fault, "request %s: its error could not be sent", responder.request_id)
            # The text itself may be what cannot be sent. A responder that has ended refuses this one too.
            try:
                responder.fail(InternalError("internal error; the server's log has the reason"))
            except BaseException as again:
                _log_fault(again, "request %s: its last reply could not be sent", responder.request_id)


def public_error(responder: Responder, error: BaseException) -> ManyloraError:
    """What a user is told of an error.

    Returns: one of ours as it is; for any other INTERNAL, and the log gets its traceback.
    """
    if isinstance(error, ManyloraError):
        return error
    _log_fault(error, "request %s failed", responder.request_id)
    return InternalError(f"request {responder.request_id}: internal error; the server's log has the reason")


def _reason_to_end(call: Call, now_s: float) -> ManyloraError | None:
    """Why a call that nothing has come for should end now."""
    if call.responder.is_cancelled():
        return CancelledRequestError("the request was cancelled by its client")
    late = call.next_deadline
    if late is not None and now_s > late.deadline_s + DEADLINE_GRACE_S:
        if not late.num_input_tokens:
            return UnavailableError(
                f"deadline_ms={late.deadline_ms} passed while the prompt waited to be tokenised"
            )
        # Whether the engine is busy or hangs, nobody can tell from here.
        return UnavailableError(
            f"deadline_ms={late.deadline_ms} passed after {late.stream.num_tokens} tokens; "
            "the engine has not come to it yet"
        )
    return None


def _log_fault(error: BaseException, message: str, *args: object) -> None:
    # A log that cannot be written, or a traceback that cannot be formatted, must cost nobody an answer.
    with contextlib.suppress(BaseException):
        log.error(message, *args, exc_info=error)
