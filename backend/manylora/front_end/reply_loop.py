"""The thread that replies: it owns all calls in flight and is the only one that sends anything to clients.

Each turn processes everything that has arrived, then sends one reply for each call that has news. When
sending lags behind the engine, tokens of several steps therefore go out together.

A fault in handling one call ends that call; one of the loop itself ends all calls; neither ends the thread.
It catches BaseException for that: libraries written in Rust panic with an exception that is not an Exception.
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
from manylora.front_end.answer import GrowingAnswer
from manylora.front_end.call import Call
from manylora.front_end.responder import Responder
from manylora.ipc import Event
from manylora.messages import Failed
from manylora.supervise.health import Stage

log = logging.getLogger(__name__)

CHECK_S = 0.1
"""How often each call is checked: whether its client is still there, which takes Triton 30 us, and its
deadline."""
DEADLINE_GRACE_S = 0.25
"""How long after a deadline the engine has time to report itself that it has passed. In a long step it
cannot."""


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
    """Handle what has arrived, then end."""


Item = Call | Refused | list[Event] | Lost | _Closed
"""What other threads put into the loop's inbox."""


class ReplyLoop:
    """Takes care of calls until their last reply. Every call gets exactly one, whatever happens."""

    def __init__(self, *, cancel: Callable[[int], None]) -> None:
        """Start the thread.

        Args:
            cancel: frees a sequence in the engine; may raise ManyloraError when there is no engine.
        """
        self._cancel = cancel
        self.stage = Stage()
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        # Guards the two together: nothing is put behind the end, where nobody would answer it.
        self._lock = threading.Lock()
        self._is_closed = False
        # Below: the thread's own. Items and news survive a turn that a fault interrupts.
        self._items: deque[Item] = deque()
        """Taken out of the inbox, not handled yet."""
        self._news: dict[Call, None] = {}
        """Calls with something to send."""
        self._calls: dict[int, Call] = {}
        """By the ids of their sequences that have not ended."""
        self._check_at_s = 0.0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="manylora-reply", daemon=True)
        self._thread.start()

    def put(self, item: Call | Refused | list[Event] | Lost) -> None:
        """Hand something to the loop, from any thread. A call must come before its events.

        What comes after `close` has begun is answered here, on the caller's thread.
        """
        with self._lock:
            if not self._is_closed:
                self._inbox.put(item)
                return
        if isinstance(item, Refused):
            self._send_error(item.responder, item.error)
        elif isinstance(item, Call):
            item.has_ended = True
            self._send_error(item.responder, _shutting_down())

    def close(self) -> None:
        """Fail all calls with UNAVAILABLE and end the thread."""
        with self._lock:
            self._is_closed = True
            self._inbox.put(_Closed())
        self._thread.join()

    # From here on: the thread's own methods.

    def _run(self) -> None:
        while not self._is_closing:
            # What breaks even the recovery, such as a lack of memory, may be over by the next turn.
            with contextlib.suppress(BaseException):
                try:
                    self._fetch_items()
                    with self.stage:
                        self._turn()
                except BaseException as error:
                    self._recover(error)
        self._fail_all(_shutting_down())

    def _turn(self) -> None:
        while self._items:
            item = self._items.popleft()
            try:
                self._handle(item)
            except BaseException as error:
                self._recover(error, item)
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

    def _fetch_items(self) -> None:
        """Empty the inbox; wait for the first item, but not past the next check of the calls."""
        timeout_s = max(0.001, self._check_at_s - time.monotonic()) if self._calls else None
        with contextlib.suppress(queue.Empty):
            if not self._items:
                self._items.append(self._inbox.get(timeout=timeout_s))
            while True:
                self._items.append(self._inbox.get_nowait())

    def _handle(self, item: Item) -> None:
        if isinstance(item, Call):
            self._calls.update((answer.id, item) for answer in item.answers)
        elif isinstance(item, Refused):
            self._send_error(item.responder, item.error)
        elif isinstance(item, Lost):
            self._fail_all(UnavailableError("the engine has ended; try again in a while"))
        elif isinstance(item, _Closed):
            self._is_closing = True
        else:
            for event in item:
                call = self._calls.get(event.id)
                if call is not None:
                    self._apply(call, event)

    def _apply(self, call: Call, event: Event) -> None:
        """Apply one event."""
        if isinstance(event, Failed):
            self._fail(call, errors.from_code(event.code, event.message))
            return
        try:
            answer = next(answer for answer in call.answers if answer.id == event.id)
            answer.add(event)
            if answer.finish_reason:
                del self._calls[answer.id]
                if not event.finish_reason:
                    self._stop_in_engine(answer)
            if call.responder.is_streaming or call.has_finished:
                self._news[call] = None
        except BaseException as error:
            self._fail(call, public_error(call.responder, error))

    def _reply(self, call: Call) -> None:
        try:
            call.responder.send([answer.drain() for answer in call.answers], is_last=call.has_finished)
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

    def _recover(self, error: BaseException, item: Item | None = None) -> None:
        """End all calls, and the one in `item`, after a fault that may have affected any of them.

        A call may have had its last reply by then; its responder refuses another.
        """
        _log_fault(error, "the reply loop has failed; all its requests end with INTERNAL")
        failure = InternalError("internal error; the server's log has the reason")
        if isinstance(item, Call) and item not in self._calls.values():
            self._fail(item, failure)
        self._fail_all(failure)

    def _fail_all(self, error: ManyloraError) -> None:
        for call in dict.fromkeys([*self._news, *self._calls.values()]):
            if call.has_finished:
                # Its answer is complete and only waits to be sent.
                self._news.pop(call, None)
                self._reply(call)
            else:
                self._fail(call, error)

    def _fail(self, call: Call, error: ManyloraError) -> None:
        """End a call whose last reply has not been sent."""
        self._news.pop(call, None)
        call.has_ended = True
        try:
            for answer in call.answers:
                if self._calls.pop(answer.id, None) is not None:
                    self._stop_in_engine(answer)
        finally:
            # Nothing else would end a call that is no longer in `_calls`.
            self._send_error(call.responder, error)

    def _stop_in_engine(self, answer: GrowingAnswer) -> None:
        try:
            self._cancel(answer.id)
        except ManyloraError:
            # Without an engine there is nothing to stop.
            return
        except BaseException as error:
            _log_fault(error, "sequence %d could not be cancelled", answer.id)

    def _send_error(self, responder: Responder, error: ManyloraError) -> None:
        try:
            responder.fail(error)
        except BaseException as fault:
            _log_fault(fault, "request %s: its error could not be sent", responder.request_id)
            # The text itself may be what cannot be sent. A responder that has ended refuses this error as
            # well.
            try:
                responder.fail(InternalError("internal error; the server's log has the reason"))
            except BaseException as again:
                _log_fault(again, "request %s: its last reply could not be sent", responder.request_id)


def public_error(responder: Responder, error: BaseException) -> ManyloraError:
    """The error that the client is sent.

    Returns: one of ours as it is; for any other INTERNAL, and its traceback goes to the log.
    """
    if isinstance(error, ManyloraError):
        return error
    _log_fault(error, "request %s failed", responder.request_id)
    return InternalError(f"request {responder.request_id}: internal error; the server's log has the reason")


def _shutting_down() -> UnavailableError:
    return UnavailableError("the server is shutting down")


def _reason_to_end(call: Call, now_s: float) -> ManyloraError | None:
    """Why a call should end now although the engine has not ended it; None: it should not."""
    if call.responder.is_cancelled():
        return CancelledRequestError("the request was cancelled by its client")
    late = call.next_deadline
    if late is not None and now_s > late.deadline_s + DEADLINE_GRACE_S:
        if not late.num_input_tokens:
            return UnavailableError(
                f"deadline_ms={late.deadline_ms} passed while the prompt waited to be tokenised"
            )
        # Whether the engine is busy or hangs cannot be seen from here.
        return UnavailableError(
            f"deadline_ms={late.deadline_ms} passed after {late.stream.num_tokens} tokens; "
            "the engine has not come to it yet"
        )
    return None


def _log_fault(error: BaseException, message: str, *args: object) -> None:
    # A log that cannot be written, or a traceback that cannot be formatted, must not cost a client its
    # answer.
    with contextlib.suppress(BaseException):
        log.error(message, *args, exc_info=error)
