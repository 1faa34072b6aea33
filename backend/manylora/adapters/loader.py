"""Runs everything that waits for the disk under `adapter_root` on threads of its own, so that no step waits.

A file system can block a thread for ever (a file server that is gone, a FUSE mount without its process), and
nothing can end such a thread. It is written off: another one replaces it, and those who wait for its job get
an error after a while.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from manylora.errors import InternalError, ManyloraError, UnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")

STALL_S = 2.0
"""A thread that has used no processor time for so long is replaced."""
HUNG_S = 30.0
"""A job whose thread has used no processor time for so long fails."""
MAX_LOST = 8
"""Hung threads of one loader that are replaced; further ones are not."""
CLOSE_S = 5.0
"""How long `close` waits for jobs that have begun."""


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """Work for a loader's thread and, in the end, its outcome: a value or an error."""

    what: str
    """The adapter, for the log and for errors."""
    work: Callable[[], T]
    value: T | None = None
    error: ManyloraError | None = None
    is_stalled: bool = False
    """It has used no processor time for `stall_s`. It may still end."""
    is_hung: bool = False
    """It has failed for using no processor time for HUNG_S. It may still end, and `drain` returns it again
    then."""

    def run(self) -> None:
        """Do the work. An unexpected error is logged and becomes INTERNAL."""
        try:
            self.value = self.work()
        except ManyloraError as error:
            self.error = error
        except Exception:
            log.exception("loading adapter %r failed", self.what)
            self.error = InternalError(f"adapter {self.what!r} could not be loaded; the log has the reason")


@dataclass(slots=True, eq=False)
class _Worker(Generic[T]):
    """One thread, and the processor time that shows whether it is alive during a job."""

    job: Job[T] | None = None
    cpu_clock: int = 0
    cpu_s: float = -1.0
    """Processor time when it was last seen to grow."""
    alive_s: float = math.inf
    """When that was."""
    is_lost: bool = False
    """Written off: another thread has replaced it, and it ends with its job."""
    thread: threading.Thread | None = None


class Loader(Generic[T]):
    """A few daemon threads that run jobs from one queue.

    Args:
        wake: called on a loader's thread after each job, which `drain` then returns.
        clock: seconds; decides what hangs.
        stall_s: see STALL_S.
        name: of the threads.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        num_threads: int = 2,
        stall_s: float = STALL_S,
        name: str = "manylora-loader",
    ) -> None:
        self.num_threads = num_threads
        self._wake = wake
        self._clock = clock
        self._stall_s = stall_s
        self._name = name
        self._jobs: queue.SimpleQueue[Job[T] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Job[T]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._num_started = 0
        # Guards the workers and the number of jobs: the engine's thread reads them while workers begin and
        # end jobs.
        self._lock = threading.Lock()
        self._workers: set[_Worker[T]] = set()
        self._num_open = 0
        """Jobs that have been submitted and have not ended, begun or not."""
        self._next_look_s = -math.inf
        for _ in range(num_threads):
            self._start_worker()

    @property
    def num_lost(self) -> int:
        """Threads that have been written off and have not come back."""
        with self._lock:
            return sum(worker.is_lost for worker in self._workers)

    @property
    def is_blocked(self) -> bool:
        """Whether every thread has been written off, so that no job can begin."""
        with self._lock:
            return all(worker.is_lost for worker in self._workers)

    @property
    def next_s(self) -> float:
        """When `drain` should be called even if nothing has ended; infinity: no need to."""
        return self._next_look_s if self._num_open else math.inf

    def submit(self, job: Job[T]) -> None:
        """Queue a job. `drain` returns it when it has ended."""
        with self._lock:
            self._num_open += 1
        self._jobs.put(job)

    def drain(self) -> list[Job[T]]:
        """The jobs that have ended since the last call, and those that have been found to hang."""
        jobs = self._watch()
        while True:
            try:
                jobs.append(self._results.get_nowait())
            except queue.Empty:
                return jobs

    def close(self) -> None:
        """End the threads: jobs that have not begun are dropped, others waited for unless they hang."""
        self._closing.set()
        deadline_s = time.monotonic() + CLOSE_S
        with self._lock:
            workers = [worker for worker in self._workers if not worker.is_lost]
        for _ in workers:
            self._jobs.put(None)
        for worker in workers:
            assert worker.thread is not None, "a worker without its thread"
            worker.thread.join(max(0.0, deadline_s - time.monotonic()))

    def _start_worker(self) -> None:
        worker: _Worker[T] = _Worker()
        worker.thread = threading.Thread(
            target=self._run, args=(worker,), name=f"{self._name}-{self._num_started}", daemon=True
        )
        self._num_started += 1
        with self._lock:
            self._workers.add(worker)
        worker.thread.start()

    def _run(self, worker: _Worker[T]) -> None:
        worker.cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
        while not worker.is_lost and (job := self._jobs.get()) is not None:
            if self._closing.is_set():
                continue
            with self._lock:
                worker.alive_s, worker.job = self._clock(), job
            job.run()
            with self._lock:
                # Before the result, so that whoever receives it finds this thread idle.
                worker.job = None
                self._num_open -= 1
                if worker.is_lost:
                    self._workers.discard(worker)
            self._finish(job)

    def _finish(self, job: Job[T]) -> None:
        self._results.put(job)
        try:
            self._wake()
        except Exception:
            # The result is on the queue anyway, and later jobs need this thread.
            log.exception("the engine could not be woken for adapter %r", job.what)

    def _watch(self) -> list[Job[T]]:
        """Write off threads that use no processor time.

        Returns: the jobs that have just been found to hang, and those for which no thread is left.
        """
        now_s = self._clock()
        if now_s < self._next_look_s or self._closing.is_set():
            return []
        self._next_look_s = now_s + self._stall_s / 2
        hung: list[Job[T]] = []
        with self._lock:
            for worker in self._workers:
                job = worker.job
                if job is None or job.is_hung:
                    continue
                cpu_s = time.clock_gettime(worker.cpu_clock)
                # A thread that reads, however slowly, or waits for the interpreter's lock uses a little.
                if cpu_s != worker.cpu_s:
                    worker.cpu_s, worker.alive_s = cpu_s, max(worker.alive_s, now_s)
                    continue
                if now_s - worker.alive_s >= self._stall_s:
                    worker.is_lost = job.is_stalled = True
                if now_s - worker.alive_s >= HUNG_S:
                    job.is_hung = True
                    hung.append(job)
            num_working = sum(not worker.is_lost for worker in self._workers)
            are_hung = all(worker.job is not None and worker.job.is_hung for worker in self._workers)
            max_new = self.num_threads + MAX_LOST - len(self._workers)
        num_new = min(self.num_threads - num_working, max_new)
        for _ in range(num_new):
            self._start_worker()
        for job in hung:
            job.error = UnavailableError(
                f"adapter {job.what!r}: its files have given no answer for {HUNG_S:g} s"
            )
            log.error("%s; a thread is lost to them", job.error.message)
        return hung + (self._refuse_waiting() if are_hung and not num_new else [])

    def _refuse_waiting(self) -> list[Job[T]]:
        """Fail the queued jobs: all threads hang, and no more are started."""
        refused: list[Job[T]] = []
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return refused
            assert job is not None, "a closed loader is not watched"
            with self._lock:
                self._num_open -= 1
            job.error = UnavailableError(
                f"adapter {job.what!r} cannot be read now: {self.num_lost} threads wait for files under "
                "adapter_root that give no answer"
            )
            refused.append(job)
