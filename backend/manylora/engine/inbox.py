"""The engine thread's inbox: where other threads leave messages."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator

from manylora.engine.session import EngineMessage, Sent, StatusRequest
from manylora.errors import UnavailableError
from manylora.messages import Generate


class Inbox:
    """A queue of messages. Once it is closed, each one is answered at once with UNAVAILABLE."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[EngineMessage] = queue.SimpleQueue()
        self._is_closed = threading.Event()

    def put(self, message: EngineMessage) -> None:
        """Leave a message. Thread-safe, never blocks."""
        self._queue.put(message)
        # Looked at afterwards: whatever `close` has not seen in the queue sees the closed flag here.
        if self._is_closed.is_set():
            self._refuse()

    def drain(self, *, wait: bool, until_s: float) -> Iterator[EngineMessage]:
        """All messages that are there.

        Args:
            wait: whether to block until there is one.
            until_s: when to stop waiting, on the monotonic clock; infinity: never.
        """
        left_s = until_s - time.monotonic()
        timeout_s = None if left_s == math.inf else min(max(left_s, 0.0), threading.TIMEOUT_MAX)
        try:
            yield self._queue.get(block=wait, timeout=timeout_s)
            while True:
                yield self._queue.get_nowait()
        except queue.Empty:
            return

    def close(self) -> None:
        """Answer what is there and whatever comes. May be called again."""
        self._is_closed.set()
        self._refuse()

    def _refuse(self) -> None:
        while True:
            try:
                message = self._queue.get_nowait()
            except queue.Empty:
                return
            error = UnavailableError("the engine is closed")
            if isinstance(message, StatusRequest):
                message.answer.set_exception(error)
            elif isinstance(message, Sent) and isinstance(message.message, Generate):
                message.session.fail(message.message.id, error)
                message.session.flush()
