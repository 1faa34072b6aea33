"""The thread that reads long prompts, so that nobody else waits for them, and its bounded queue."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from manylora.errors import UnavailableError

MAX_LONG = 256
"""Requests with long prompts that may wait to be tokenised; one more is refused."""
MAX_LONG_BYTES = 256 << 20
"""Of their prompts together. One request alone is taken whatever its size."""
BYTES_PER_S = 100_000
"""A prompt of so many bytes comes after the short ones that arrive within a second of it: a client that sends
the longest ones without end holds up others of their length, and none waits for ever."""

Job = TypeVar("Job")


class LongPrompts(Generic[Job]):
    """Runs jobs one by one on a thread of its own, short and early ones first."""

    def __init__(self, run: Callable[[Job], None]) -> None:
        """Start the thread.

        Args:
            run: does one job; never raises.
        """
        self._run_job = run
        # Guards all below.
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, int, Job]] = []
        """A heap of turn, number, bytes and job."""
        self._num_bytes = 0
        self._is_closing = False
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="manylora-long", daemon=True)
        self._thread.start()

    def require_room(self, num_bytes: int) -> None:
        """
        Raises:
            UnavailableError: too many wait already, or too much.
        """
        with self._changed:
            num_waiting, num_waiting_bytes = len(self._waiting), self._num_bytes
        if num_waiting >= MAX_LONG or (num_waiting and num_waiting_bytes + num_bytes > MAX_LONG_BYTES):
            raise UnavailableError(
                f"{num_waiting} requests with long prompts wait to be tokenised; try again later"
            )

    def put(self, job: Job, num_bytes: int, arrived_s: float) -> None:
        """Queue a job. Of one caller's thread, after `require_room`."""
        turn = arrived_s + num_bytes / BYTES_PER_S
        with self._changed:
            heapq.heappush(self._waiting, (turn, next(self._numbers), num_bytes, job))
            self._num_bytes += num_bytes
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the job that it is at. Others are dropped."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if self._is_closing:
                    return
                _, _, num_bytes, job = heapq.heappop(self._waiting)
                self._num_bytes -= num_bytes
            self._run_job(job)
            # Or it would be held in memory until the next one comes.
            del job
