"""A second stream for work that runs beside what the current stream does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")

_AS_RECORDED = ContextVar("_AS_RECORDED", default=False)


class Streams(Protocol):
    """Two streams of one device: the current one and one beside it."""

    def fork(self) -> None:
        """Have the other stream wait for all that the current one was given."""

    def beside(self) -> AbstractContextManager[object]:
        """Within it launches go to the other stream."""

    def join(self) -> None:
        """Have the current stream wait for all that the other one was given."""


class SideStream:
    """The other stream of a CUDA device, the same one for every call.

    Fork and join are events, the form in which a graph that is captured takes in a second stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # High priority: small kernels beside a product that fills the device get the first multiprocessors
        # that become free. Such streams come from a pool of their own, which copies of adapters never use.
        self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]  # torch's own

    def fork(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def beside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream)

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


@functools.lru_cache(maxsize=16)
def side_stream(device: torch.device) -> Streams | None:
    """The side stream of a device; None where there are no streams."""
    return SideStream(device) if device.type == "cuda" else None


def run_beside(
    streams: Streams | None, side_work: Callable[[], object], main_work: Callable[[], Result]
) -> Result:
    """Run both at the same time and return when what follows may use the results of both.

    Memory needs no care beyond this: what the side work uses is made on the current stream before the fork
    and is given up after the join, so to the allocator, and to the private pool of a graph that is captured,
    it was only ever the current stream's. The side work must therefore allocate nothing.

    Args:
        streams: None: one after the other.
        side_work: launched first, so that it does not queue behind a product that fills the device.
        main_work: launched on the current stream.

    Returns:
        What `main_work` returns.
    """
    if streams is None:
        side_work()
        return main_work()
    streams.fork()
    try:
        with streams.beside():
            side_work()
        return main_work()
    finally:
        # Even after a failure: whoever sees the error frees memory, and a capture must end joined.
        streams.join()


@contextmanager
def as_recorded() -> Iterator[None]:
    """Within it this thread launches what it would launch while a graph is recorded, although none is.

    Steps launch other kernels inside a graph than outside. The run before a recording happens within this,
    since a kernel that is first loaded while a graph is recorded spoils the recording.
    """
    token = _AS_RECORDED.set(True)
    try:
        yield
    finally:
        _AS_RECORDED.reset(token)


def is_recorded(device: torch.device) -> bool:
    """Whether launches on a CUDA device are recorded now, or run `as_recorded`. False on other devices."""
    if device.type != "cuda":
        return False
    return _AS_RECORDED.get() or torch.cuda.is_current_stream_capturing()
