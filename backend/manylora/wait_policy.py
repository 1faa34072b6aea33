"""How the OpenMP threads of a step wait for each other: actively, unless others want the processors, too.

A decode step is made of hundreds of parallel operators. Between two of them a thread of GNU's runtime spins
before it sleeps, which saves a wake each time: on free processors a step of few rows takes a third less.
Where another process wants a processor, the spinning takes time from the very thread that is waited for, and
steps take several times as long as with threads that sleep at once (bench/contention.py).

GNU's runtime reads how long to spin once. But while a process has more OpenMP threads than processors, its
threads spin for a moment only. So further OpenMP threads, which sleep, switch the spinning off.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from manylora_kernels.compiled import openmp_runtime

log = logging.getLogger(__name__)

LOOK_S = 0.3
"""From one look to the next."""
MOST_WAITED = 0.6
"""Above it threads stop spinning: the time that this process's threads have waited for a processor, all
together, as a part of the time that has passed. One busy process on two processors makes it 0.8 and more; the
front ends and clients of a server that streams to 32 make it 0.25, for whom sleeping would cost a fifth."""
LEAST_WAITED = 0.27
"""Below it, for `FREE_S`, they spin again. Threads that sleep wait less: 0.36 and more beside one busy
process, 0.19 at most beside those front ends and clients."""
FREE_S = 1.0
IDLE_S = 1.0
"""A look so long after the last one starts a new measurement: in between, the engine was idle."""


class WaitPolicy:
    """The policy of one process, owned by the thread that runs its steps.

    Args:
        num_threads: threads of a step; a single one never waits.
        waited_s: the seconds that this process's threads have waited for a processor, since they began.
    """

    def __init__(self, num_threads: int, waited_s: Callable[[], float] | None = None) -> None:
        runtime = openmp_runtime()
        is_gnu = runtime is not None and Path(runtime).name.startswith("libgomp")
        self._crowd = SleepingThreads(runtime) if runtime and is_gnu and num_threads > 1 else None
        self._read_waited_s = waited_s or _RunQueue().waited_s
        self._looked_s = -IDLE_S
        self._waited_s = 0.0
        self._busy_s = 0.0
        """When the processors were last wanted by others."""
        self._num_changes = 0

    @property
    def is_passive(self) -> bool:
        """Whether threads sleep at once."""
        return self._crowd is not None and self._crowd.are_there

    def look(self, now_s: float | None = None) -> None:
        """Choose the policy, after a step.

        Args:
            now_s: by `time.monotonic`; None: now.
        """
        now_s = time.monotonic() if now_s is None else now_s
        passed_s = now_s - self._looked_s
        if self._crowd is None or passed_s < LOOK_S:
            return
        waited_s = self._read_waited_s()
        share = (waited_s - self._waited_s) / passed_s
        self._looked_s, self._waited_s = now_s, waited_s
        if passed_s >= IDLE_S or share > LEAST_WAITED:
            self._busy_s = now_s
        if passed_s >= IDLE_S:
            return
        if not self._crowd.are_there and share > MOST_WAITED:
            self._crowd.start()
            self._log_change("other processes want the processors: threads of a step sleep at once")
        elif self._crowd.are_there and now_s - self._busy_s >= FREE_S:
            self._crowd.stop()
            self._log_change("the processors are free again: threads of a step spin before they sleep")

    def close(self) -> None:
        """End the threads that sleep."""
        if self._crowd is not None:
            self._crowd.stop()

    def _log_change(self, what: str) -> None:
        """Log the first change and its end as INFO, later ones as DEBUG: they may be many."""
        self._num_changes += 1
        log.log(logging.INFO if self._num_changes <= 2 else logging.DEBUG, "%s", what)


class _RunQueue:
    """The time that this process's threads have waited for a processor, as the kernel counts it."""

    REFRESH_LOOKS = 10
    """Between two looks for new threads, which cost more than reading the known ones."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._num_looks = 0

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def waited_s(self) -> float:
        """Seconds in which threads could have run and had no processor. 0 where the kernel does not count."""
        if self._num_looks % self.REFRESH_LOOKS == 0:
            self._open_new()
        self._num_looks += 1
        waited_ns = 0
        for thread, file in list(self._files.items()):
            try:
                waited_ns += int(os.pread(file, 100, 0).split()[1])
            except OSError:  # it has ended
                os.close(self._files.pop(thread))
        return waited_ns / 1e9

    def _open_new(self) -> None:
        for thread in set(os.listdir("/proc/self/task")) - self._files.keys():
            try:
                self._files[thread] = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)
            except OSError:  # it has ended, or the kernel does not count
                continue


class SleepingThreads:
    """One OpenMP thread more than there are processors.

    Args:
        runtime: path of GNU's OpenMP library that this process has loaded.
    """

    def __init__(self, runtime: str) -> None:
        self._runtime = ctypes.CDLL(runtime)
        self._libc = ctypes.CDLL(None)
        self._semaphore = ctypes.create_string_buffer(64)
        """A `sem_t` and more."""
        self._num_threads = 0
        self._leader: threading.Thread | None = None

    @property
    def are_there(self) -> bool:
        """Whether they were started and not stopped."""
        return self._leader is not None

    def start(self) -> None:
        """Start them. They count in a moment."""
        self._num_threads = int(self._runtime.omp_get_num_procs()) + 1
        self._libc.sem_init(self._semaphore, 0, 0)
        self._leader = threading.Thread(target=self._lead, name="manylora-sleepers", daemon=True)
        self._leader.start()

    def _lead(self) -> None:
        # A parallel part of so many threads, in which each calls sem_wait(semaphore).
        self._runtime.GOMP_parallel(self._libc.sem_wait, self._semaphore, self._num_threads, 0)

    def stop(self) -> None:
        """End them; does nothing if there are none."""
        if self._leader is None:
            return
        for _ in range(self._num_threads):
            self._libc.sem_post(self._semaphore)
        # The runtime ends with a thread those that it had started for it.
        self._leader.join()
        self._leader = None
