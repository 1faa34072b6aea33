"""Records work on a CUDA device once and launches it again as a whole; elsewhere runs it again.

The only file that knows `torch.cuda.CUDAGraph`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

log = logging.getLogger(__name__)

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
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, body: Callable[[], Result]) -> Result:
        """Run `body` on the side stream: kernels are compiled and libraries set up before any capture."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = body()
        current.wait_stream(self._stream)
        return result

    def record(self, body: Callable[[], None]) -> Replay:
        """Capture `body` after one run of it."""
        self.warm_up(body)
        graph = torch.cuda.CUDAGraph()
        # torch's own context leaves its stream current when ending a spoilt capture raises; this one does
        # not. Loaders may call CUDA on their threads meanwhile, which is no concern of the capture.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            body()
        return graph.replay

    def abandon(self) -> None:
        """Wait for all work, which shows whether the device still computes, and give memory back."""
        torch.cuda.synchronize(self._device)
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # A capture that did not end well can leave torch's allocator believing that it goes on.
            log.warning("memory of the failed recording is not given back: %s", error)

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
