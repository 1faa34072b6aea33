"""OpenMP threads of torch's operators on a CPU.

Each thread that runs a parallel operator gets OpenMP threads of its own, for as long as it lives. While the
process has more of them than processors, GNU's runtime lets none wait actively for its next part: each then
sleeps between any two operators, and a decode step has some hundred.
"""

from __future__ import annotations

import ctypes

import torch
from manylora_kernels.compiled import openmp_runtime


def use_one_thread() -> None:
    """Have torch's operators on the calling thread use that thread alone.

    `torch.set_num_threads` would do so for threads to come, too.
    """
    # Torch sets a thread's number on its first use, which would undo what follows.
    torch.get_num_threads()
    runtime = openmp_runtime()
    if runtime is not None:
        ctypes.CDLL(runtime).omp_set_num_threads(1)
