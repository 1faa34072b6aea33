"""Time on a device: graphs, forms that take turns, bandwidth."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from gpu.floors import Bandwidth

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds: of one layer, or of one step."""

    median: float
    least: float
    most: float


def graph_of(run: Run, device: torch.device) -> Run:
    """The same as one CUDA graph, run twice beforehand; on a CPU as it is, run once beforehand."""
    if device.type != "cuda":
        run()
        return run
    side = _warm_up_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        # The graph reads tensors that only `run` holds.
        _ = run
        graph.replay()

    return replay


@functools.cache
def _warm_up_stream() -> torch.cuda.Stream:
    """One for all: streams come from a small pool, and a new one may be any that is in use."""
    return torch.cuda.Stream()


def time_in_turn(
    runs: Mapping[str, Run], device: torch.device, repeats: int, divide: float = 1.0
) -> dict[str, Timing]:
    """Microseconds of each, divided by e.g. the number of layers; they take turns.

    Args:
        runs: what to time, by name.
        repeats: how often each is timed, after one run that is not.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(time_of(run, device) / divide)
    return {name: Timing(statistics.median(mine), min(mine), max(mine)) for name, mine in times.items()}


def time_of(run: Run, device: torch.device) -> float:
    """Microseconds of one run."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def measured_bandwidth(device: torch.device) -> Bandwidth:
    """Of a large copy, and of the faster of two that read: a sum, and a matrix times a vector."""
    size = (1 << 30) if device.type == "cuda" else (1 << 20)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = 2 * size / _fastest(lambda: target.copy_(source), device)
    numbers = source.view(torch.float32)
    reads = {"sum": size / _fastest(lambda: torch.sum(numbers), device)}
    if device.type == "cuda":
        matrix = source.view(torch.bfloat16).view(-1, 8192)
        vector = torch.zeros(8192, dtype=torch.bfloat16, device=device)
        reads["matrix times vector"] = size / _fastest(lambda: torch.mv(matrix, vector), device)
    best = max(reads, key=lambda name: reads[name])
    return Bandwidth(read=reads[best], copy=copy, read_by=best)


def _fastest(run: Run, device: torch.device) -> float:
    """Seconds of the best of ten runs."""
    return min([time_of(run, device) for _ in range(12)][2:]) * 1e-6
