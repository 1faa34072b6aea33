"""Copies between host and device that nobody waits for."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to a device, on the current stream.

    On CUDA through pinned memory: a copy from any other memory stops the host until the stream has come to
    it. torch keeps pinned memory until the copies that read it are done.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host, behind what their stream has been given so far."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = [_to_host(tensor) for tensor in tensors]
        self._done: torch.cuda.Event | None = None
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self._done = torch.cuda.current_stream().record_event()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, in order."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
