"""Copies from host to device without a wait."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def upload(array: npt.NDArray[Any], device: torch.device | str) -> torch.Tensor:
    """Copy an array to a device, on the current stream; on a CPU, share its memory.

    On CUDA through pinned memory: a copy from any other memory blocks the host until the stream reaches
    it. torch keeps pinned memory until the copies that read it are done.
    """
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
