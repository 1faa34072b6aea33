"""The thread that answers: it owns all calls in flight and is the only one that sends replies.

Each turn takes everything that has come, then sends one reply for each call that has news. When sending lags
behind the engine, tokens of several steps therefore go out together.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from manylora import errors, protocol
from manylora.call import Call, Responder, Row
from manylora.errors import CancelledRequestError, InternalError, ManyloraError, UnavailableError
from manylora.ipc import Event
from manylora.messages import Failed

log = logging.getLogger(__name__)

CANCEL_CHECK_S = 0.1
"""How often a call is asked whether its client is still there: it takes Triton 30 us each."""


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
        self._inbox: queue.SimpleQueue[Note] = queue.SimpleQueue()
        # Below: the thread's.
        self._calls: dict[int, Call] = {}
        """By the ids of their sequences that have not ended."""
        self._check_at = 0.0
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
            news: dict[Call, None] = {}
            for note in self._take_notes():
                self._follow(note, news)
            for call in news:
                self._reply(call)
            if self._calls and time.monotonic() >= self._check_at:
                self._drop_cancelled()
                self._check_at = time.monotonic() + CANCEL_CHECK_S
        self._fail_all(UnavailableError("the server is shutting down"))

    def _take_notes(self) -> list[Note]:
        """All notes there are; waits for the first, but not past the next look for cancelled calls."""
        notes: list[Note] = []
        timeout_s = max(0.001, self._check_at - time.monotonic()) if self._calls else None
        with contextlib.suppress(queue.Empty):
            notes.append(self._inbox.get(timeout=timeout_s))
            while True:
                notes.append(self._inbox.get_nowait())
        return notes

    def _follow(self, note: Note, news: dict[Call, None]) -> None:
        if isinstance(note, Call):
            self._calls.update((row.id, note) for row in note.rows)
        elif isinstance(note, Refused):
            self._send_error(note.responder, note.error)
        elif isinstance(note, Lost):
            for failed in self._fail_all(UnavailableError("the engine has ended; try again in a while")):
                news.pop(failed, None)
        elif isinstance(note, _Closed):
            self._is_closing = True
        else:
            for event in note:
                call = self._calls.get(event.id)
                if call is not None and self._take(call, event):
                    news[call] = None
                elif call is not None:
                    news.pop(call, None)

    def _take(self, call: Call, event: Event) -> bool:
        """Apply one event. False: the call has ended with an error."""
        if isinstance(event, Failed):
            self._fail(call, errors.from_code(event.code, event.message))
            return False
        try:
            row = next(row for row in call.rows if row.id == event.id)
            row.take(event)
            if row.finish_reason:
                del self._calls[row.id]
                if not event.finish_reason:
                    self._stop_in_engine(row)
        except Exception as error:
            self._fail(call, internal_error(call.responder, error))
            return False
        return True

    def _reply(self, call: Call) -> None:
        if not (self._is_streaming or call.has_finished):
            return
        try:
            outputs = protocol.encode([row.answer() for row in call.rows])
            call.responder.send(outputs, is_last=call.has_finished)
        except Exception as error:
            self._fail(call, internal_error(call.responder, error))

    def _drop_cancelled(self) -> None:
        for call in dict.fromkeys(self._calls.values()):
            try:
                if call.responder.is_cancelled():
                    self._fail(call, CancelledRequestError("the request was cancelled by its client"))
            except Exception as error:
                self._fail(call, internal_error(call.responder, error))

    def _fail_all(self, error: ManyloraError) -> list[Call]:
        calls = list(dict.fromkeys(self._calls.values()))
        for call in calls:
            self._fail(call, error)
        return calls

    def _fail(self, call: Call, error: ManyloraError) -> None:
        for row in call.rows:
            if self._calls.pop(row.id, None) is not None:
                self._stop_in_engine(row)
        self._send_error(call.responder, error)

    def _stop_in_engine(self, row: Row) -> None:
        # Without an engine there is nothing to stop.
        with contextlib.suppress(ManyloraError):
            self._cancel(row.id)

    def _send_error(self, responder: Responder, error: ManyloraError) -> None:
        try:
            responder.fail(error)
        except Exception:
            log.exception("request %s: its last reply could not be sent", responder.request_id)


def internal_error(responder: Responder, error: Exception) -> InternalError:
    """Log a fault of ours with its traceback; return what the user is told."""
    log.error("request %s failed", responder.request_id, exc_info=error)
    return InternalError(f"request {responder.request_id}: internal error; the server's log has the reason")
