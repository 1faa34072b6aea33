"""The engine thread's inbox: where other threads leave their notes."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator

from manylora.engine.session import Asked, Note, Sent
from manylora.errors import UnavailableError
from manylora.messages import Generate


class Notes:
    """A queue of notes. Once it is closed, each one is answered at once with UNAVAILABLE."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Note] = queue.SimpleQueue()
        self._is_closed = threading.Event()

    def put(self, note: Note) -> None:
        """Leave a note. Thread-safe, never blocks."""
        self._queue.put(note)
        # Looked at afterwards: whatever `close` has not seen in the queue sees the closed flag here.
        if self._is_closed.is_set():
            self._refuse()

    def take(self, *, wait: bool, until_s: float) -> Iterator[Note]:
        """All notes that are there.

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
                note = self._queue.get_nowait()
            except queue.Empty:
                return
            error = UnavailableError("the engine is closed")
            if isinstance(note, Asked):
                note.answer.set_exception(error)
            elif isinstance(note, Sent) and isinstance(note.message, Generate):
                note.session.fail(note.message.id, error)
                note.session.flush()
