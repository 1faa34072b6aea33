"""Records work on a CUDA device once and launches it again as a whole; elsewhere runs it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from manylora_kernels import capture

Replay = Callable[[], None]
Result = TypeVar("Result")


class Recorder(Protocol):
    """What records: on CUDA graphs, on a CPU the function itself."""

    def warm_up(self, body: Callable[[], Result]) -> Result:
        """Run `body` once as it will be recorded."""

    def record(self, body: Callable[[], None]) -> Replay:
        """Return what does `body`'s work again, on the same tensors, on the stream that is current then.

        Raises:
            Exception: `body` does what cannot be recorded, or memory lacks. The device can be used further
                after `abandon`.
        """

    def abandon(self) -> None:
        """Bring the device in order after a failure."""

    def free_bytes(self) -> int:
        """The device's free memory, 0 where none is counted."""


def recorder_for(device: torch.device) -> Recorder:
    """The recorder of a device."""
    return CudaRecorder(device) if device.type == "cuda" else PlainRecorder()


class CudaRecorder:
    """Records CUDA graphs, all with one pool of memory: they must not run at the same time, in whichever
    order they do. What a graph leaves in memory of its own is lost when another runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # One stream for all, since a pool's memory is only shared within a stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no stub
        self._pool = capture.new_pool()

    def warm_up(self, body: Callable[[], Result]) -> Result:
        """Run `body` on the side stream: kernels are compiled and libraries set up before any capture."""
        results: list[Result] = []
        capture.warm_up(lambda: results.append(body()), self._stream)
        return results[0]

    def record(self, body: Callable[[], None]) -> Replay:
        """Capture `body` after one run of it."""
        self.warm_up(body)
        try:
            return capture.capture(body, self._stream, self._pool).replay
        except BaseException:
            # The pool of a failed capture takes no other.
            self._pool = capture.new_pool()
            raise

    def abandon(self) -> None:
        """Wait for all work, which shows whether the device still computes, and give memory back."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """As the driver counts it, graphs' own memory with it."""
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.mem_get_info(self._device)[0])


class PlainRecorder:
    """The same for a CPU, where there is nothing to gain: a replay runs the function once more."""

    def warm_up(self, body: Callable[[], Result]) -> Result:
        """Run `body`."""
        return body()

    def record(self, body: Callable[[], None]) -> Replay:
        """Return `body` itself."""
        return body

    def abandon(self) -> None:
        """Nothing is left behind."""

    def free_bytes(self) -> int:
        """Not counted."""
        return 0
