"""Memory of the CPU: taken as it is used, kept once it is taken."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch

# mallopt's options, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_ALIGNMENT = 64
"""Bytes: one cache line, so that no vector load of a CPU kernel crosses two."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A zeroed tensor. On a CPU, memory is taken when it is first written.

    `torch.zeros` writes its zeros, so a KV cache for the busiest hour would cost its whole size at once.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: a step's temporaries then come back without a page fault for each page.

    Left to itself, malloc returns blocks of some megabytes to the system at every step and takes them anew,
    and the pages of each are zeroed and mapped again. For the whole process; without glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # One arena, since those of other threads are trimmed by rules of their own.
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 1 << 30)):
        mallopt(option, value)
