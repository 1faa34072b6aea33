"""Time on a device: graphs, forms that take turns, bandwidth."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from manylora_kernels import capture

from bench.gpu.floors import Bandwidth

Run = Callable[[], object]

LEAST_SAMPLE_US = 1000.0
"""An event's clock ticks in half microseconds, and a launch's gap is a few."""
_MOST_RUNS = 200
"""In one sample."""
_SPIN_CYCLES = 400_000
"""About 200 us of a GPU's clock: so long the host has to queue what is timed."""
_WARM_S = 0.3
"""Of work before bandwidth is measured: an idle GPU's clocks are low."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds: of one layer, or of one step."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Of several samples."""
        return cls(statistics.median(samples), min(samples), max(samples))


def graph_of(run: Run, device: torch.device) -> Run:
    """The same as one CUDA graph, run twice beforehand; on a CPU as it is, run once beforehand."""
    if device.type != "cuda":
        run()
        return run
    for _ in range(2):
        capture.warm_up(run, _side_stream())
    graph = capture.capture(run, _side_stream())

    def replay() -> None:
        # The graph reads tensors that only `run` holds.
        _ = run
        graph.replay()

    return replay


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all: streams come from a small pool, and a new one may be any that is in use."""
    return torch.cuda.Stream()


def time_in_turn(
    runs: Mapping[str, Run], device: torch.device, repeats: int, divide: float = 1.0
) -> dict[str, Timing]:
    """Microseconds of each, as `samples_in_turn` takes them."""
    samples = samples_in_turn(runs, device, repeats, dict.fromkeys(runs, divide))
    return {name: Timing.of(mine) for name, mine in samples.items()}


def samples_in_turn(
    runs: Mapping[str, Run], device: torch.device, repeats: int, divide: Mapping[str, float]
) -> dict[str, list[float]]:
    """Microseconds of each, one for each round; they take turns, each as often in a sample as the others.

    Args:
        runs: what to time, by name.
        repeats: how many rounds, after one run of each that is not timed.
        divide: by what a run's time is divided, e.g. its number of layers.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    count = _runs_in_a_sample([time_of(run, device) for run in runs.values()]) if device.type == "cuda" else 1
    for _ in range(repeats):
        for name, run in runs.items():
            samples[name].append(time_of(run, device, count) / divide[name])
    return samples


def _runs_in_a_sample(micros: list[float]) -> int:
    """So many that a sample of the fastest is long enough."""
    return min(_MOST_RUNS, max(1, math.ceil(LEAST_SAMPLE_US / max(min(micros), 1.0)))) if micros else 1


def time_of(run: Run, device: torch.device, count: int = 1) -> float:
    """Microseconds of one of `count` runs, one behind the other. The device is kept busy until the host has
    queued the first, so that the host's time for a launch is not measured."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - begin) * 1e6 / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SPIN_CYCLES)
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / count


def measured_bandwidth(device: torch.device) -> Bandwidth:
    """Of a large copy, and of the faster of two that read: a sum, and a matrix times a vector. On random
    data, since a device moves zeros faster."""
    size = (1 << 30) if device.type == "cuda" else (1 << 20)
    numbers = torch.randn(size // 4, device=device)
    target = torch.empty_like(numbers)
    if device.type == "cuda":
        begin = time.monotonic()
        while time.monotonic() - begin < _WARM_S:
            target.copy_(numbers)
            torch.cuda.synchronize(device)
    copy = 2 * size / _fastest(lambda: target.copy_(numbers), device)
    reads = {"sum": size / _fastest(lambda: torch.sum(numbers), device)}
    if device.type == "cuda":
        matrix = torch.randn(size // 16384, 8192, dtype=torch.bfloat16, device=device)
        vector = torch.randn(8192, dtype=torch.bfloat16, device=device)
        reads["matrix times vector"] = size / _fastest(lambda: torch.mv(matrix, vector), device)
    best = max(reads, key=lambda name: reads[name])
    return Bandwidth(read=reads[best], copy=copy, read_by=best)


def _fastest(run: Run, device: torch.device) -> float:
    """Seconds of the best of ten runs."""
    return min([time_of(run, device) for _ in range(12)][2:]) * 1e-6
