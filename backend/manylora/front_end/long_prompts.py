"""The thread that parses and tokenises long requests, so that others need not wait, and its bounded queue."""

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
"""Of all that wait together. A request that waits alone may have any size."""
BYTES_PER_S = 100_000
"""A prompt of so many bytes is placed behind the short ones that arrive within a second of it. A client that
sends the longest ones without end therefore delays only others of their length, and none waits for ever."""

Job = TypeVar("Job")


class LongPrompts(Generic[Job]):
    """Runs jobs one by one on a thread of its own, short and early ones first. Jobs come from any thread."""

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
        self._num_jobs = 0
        """That wait or have a place reserved."""
        self._num_bytes = 0
        """Of these jobs."""
        self._is_closing = False
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="manylora-long", daemon=True)
        self._thread.start()

    def reserve(self, num_bytes: int) -> None:
        """Keep room for a job, which `put` must follow.

        Raises:
            UnavailableError: too many jobs wait already, or too many bytes.
        """
        with self._changed:
            if self._num_jobs >= MAX_LONG or (
                self._num_jobs and self._num_bytes + num_bytes > MAX_LONG_BYTES
            ):
                raise UnavailableError(
                    f"{self._num_jobs} requests with long prompts wait to be tokenised; try again later"
                )
            self._num_jobs += 1
            self._num_bytes += num_bytes

    def put(self, job: Job, num_bytes: int, arrived_s: float) -> None:
        """Queue a job for which room has been reserved."""
        turn = arrived_s + num_bytes / BYTES_PER_S
        with self._changed:
            heapq.heappush(self._waiting, (turn, next(self._numbers), num_bytes, job))
            self._changed.notify()

    def close(self) -> None:
        """End the thread once its current job is done. Those that wait are dropped."""
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
                self._num_jobs -= 1
                self._num_bytes -= num_bytes
            self._run_job(job)
            # Otherwise it would stay in memory until the next one arrives.
            del job
