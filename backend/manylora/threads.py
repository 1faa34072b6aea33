"""Threads of torch's operators on a CPU: how many a step uses, and OpenMP's waiting.

Each thread that runs a parallel operator gets OpenMP threads of its own, for as long as it lives. While the
process has more of them than processors, GNU's runtime lets none wait actively for its next part: each then
sleeps between any two operators, and a decode step has some hundred.
"""

from __future__ import annotations

import ctypes
import os

import torch
from manylora_kernels.compiled import openmp_runtime

from manylora import cgroup


def num_step_threads(asked: int) -> int:
    """`num_threads` with its default resolved: the processors that this process may use.

    That is torch's own number (OMP_NUM_THREADS, or all processors), within the affinity mask and the control
    group's quota. A quota is rounded down: one thread that it stops holds up all others.
    """
    if asked:
        return asked
    quota = cgroup.cpu_quota()
    limits = [torch.get_num_threads(), len(os.sched_getaffinity(0))]
    if quota is not None:
        limits.append(max(1, int(quota)))
    return min(limits)


def use_one_thread() -> None:
    """Have torch's operators on the calling thread use that thread alone.

    `torch.set_num_threads` would do so for threads to come, too.
    """
    # Torch sets a thread's number on its first use, which would undo what follows.
    torch.get_num_threads()
    runtime = openmp_runtime()
    if runtime is not None:
        ctypes.CDLL(runtime).omp_set_num_threads(1)
