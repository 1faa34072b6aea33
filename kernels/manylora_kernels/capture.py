"""Records CUDA work as a graph, so that a recording which fails leaves the device as it was.

The only file that knows `torch.cuda.CUDAGraph`.

`CUDAGraph.capture_end` asks the driver first, which refuses a recording that was spoilt, by a wait for the
device or by a kernel that had to be loaded. It then skips the rest (read in torch 2.11 and 2.13):

- The allocator still considers the pool of memory as being recorded into. Nothing can be recorded into that
  pool again, and no memory is returned any more.
- The recording's reference to the pool is never released: a graph does so only where its recording has ended.
- The default generator (2.11) still considers itself recorded: random numbers, and replays of other graphs
  that use it, raise. The end of any other recording resets it.
- The allocator of page-locked memory still asks the graph whether a stream belongs to its recording, and that
  cannot be stopped: the graph has to be kept, and its pool left alone.
- The recording's stream stays the current one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from manylora_kernels.streams import as_recorded

if TYPE_CHECKING:
    from torch.cuda.graphs import _POOL_HANDLE as PoolHandle  # type: ignore[attr-defined]  # torch's own

log = logging.getLogger(__name__)

_SPOILT: list[torch.cuda.CUDAGraph] = []
"""Graphs whose recording did not end: kept, since torch still refers to them."""


def new_pool() -> PoolHandle:
    """Memory for graphs that never run at the same time."""
    return torch.cuda.graph_pool_handle()


def warm_up(body: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Run `body` once as it will be recorded: kernels are loaded and libraries set up before any recording.

    Args:
        stream: of the recording; it waits for the current one, which then waits for it.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream), as_recorded():
        body()
    current.wait_stream(stream)


def capture(
    body: Callable[[], object], stream: torch.cuda.Stream, pool: PoolHandle | None = None
) -> torch.cuda.CUDAGraph:
    """Record `body`, which `warm_up` has run.

    Args:
        stream: where it is recorded; not the default one.
        pool: memory that it shares with other graphs; None: its own.

    Raises:
        Exception: `body` does what cannot be recorded, or memory lacks. The device can be used further, other
            graphs can be recorded and replayed, but `pool` must not be recorded into again.
    """
    try:
        return _record(body, stream, new_pool() if pool is None else pool)
    except BaseException:
        _free_generator(stream)
        raise


def _record(body: Callable[[], object], stream: torch.cuda.Stream, pool: PoolHandle) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer context puts the stream back, which torch's own does not where the end raises. Loaders may
        # call CUDA on their threads meanwhile, which is no concern of the recording.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            as_recorded(),
        ):
            body()
    except BaseException:
        _end(graph, stream.device, pool)
        raise
    return graph


def _end(graph: torch.cuda.CUDAGraph, device: torch.device, pool: PoolHandle) -> None:
    """Do for the allocator what `capture_end` has left out, if it has."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:
        # It got that far, or the recording never began. The graph releases the pool by itself, and a second
        # release would free the memory of other graphs.
        return
    torch._C._cuda_releasePool(index, pool)
    _SPOILT.append(graph)


def _free_generator(stream: torch.cuda.Stream) -> None:
    """Record something else: the end of any recording resets the default generator."""
    try:
        # Its kernel is loaded here, not in the recording.
        probe = torch.zeros(1, device=stream.device)
        _record(probe.zero_, stream, new_pool())
    except RuntimeError as error:
        # The caller reports the first failure.
        log.warning("after a failed recording no other one works: %s", error)
