"""Copies from device to host that are waited for once their tensors are wanted."""

from __future__ import annotations

import torch


class Download:
    """Tensors of one device on their way to the host, behind what its current stream was given before."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = [_to_host(tensor) for tensor in tensors]
        self._done: torch.cuda.Event | None = None
        if tensors[0].device.type == "cuda":
            # Who waits for it sleeps: a step takes milliseconds, and the processor has other work.
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch has no stub
            self._done.record(torch.cuda.current_stream(tensors[0].device))

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
