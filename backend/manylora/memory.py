"""Big zeroed tensors whose memory is taken as it is used."""

from __future__ import annotations

import math

import numpy as np
import torch

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
