"""Host memory: allocated when it is first written, and kept when it is freed."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from manylora import cgroup
from manylora.errors import UnavailableError

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

    By default malloc returns blocks of some megabytes to the system at every step and requests them again,
    and the kernel zeroes and maps their pages each time. For the whole process; without glibc, nothing
    happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # One arena, since those of other threads are trimmed by rules of their own.
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 1 << 30)):
        mallopt(option, value)


def host_memory() -> int:
    """Bytes that processes may hold here, swapped ones with them, within the control group's limit.

    Not what is free: that changes, and much of what other processes hold can be reclaimed.
    """
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        found[name] = int(value.split()[0]) * 1024
    total = found["MemTotal"] + found.get("SwapTotal", 0)
    limit = cgroup.memory_limit()
    return total if limit is None else min(total, limit)


@contextlib.contextmanager
def out_of_memory_as_error() -> Iterator[None]:
    """Turn a failed allocation of host or device memory into a one-line UnavailableError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = (str(error) or "out of memory").splitlines()[0]
        raise UnavailableError(f"there is too little memory to start: {reason}") from error
