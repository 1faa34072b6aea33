"""Measure `add_lora` on a GPU: microseconds a layer, bytes moved and their share of the measured bandwidth.

    python bench/kernels_gpu.py [--points few|all] [--budget-s 240] [--out bench/results/kernels_gpu.csv]
    python bench/kernels_gpu.py --cpu-logic          the same on tiny shapes in triton's interpreter

The shapes are Llama-3-8B's: a layer of four sites. Every point is first checked against float64, then
ours and its peers take turns, each a CUDA graph over more layers of different weights than the caches hold.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from lora_peers import PEERS, Step, available
from manylora_kernels import SitePool, SiteShape

LAYER = {
    "qkv": SiteShape(4096, (4096, 1024, 1024)),
    "o": SiteShape(4096, (4096,)),
    "gate_up": SiteShape(4096, (14336, 14336)),
    "down": SiteShape(14336, (4096,)),
}
TINY_LAYER = {"qkv": SiteShape(32, (32, 16, 16)), "gate_up": SiteShape(32, (48, 48))}
CACHE_BYTES = 128 << 20
"""What the layers of one graph read must be more than this, or they would be read from a cache."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest result: sums in another order, rounded to the dtype twice."""


Form: TypeAlias = Callable[[torch.Tensor, torch.Tensor, SitePool], Callable[[], None]]
"""Of y, x and the pool of a site, what adds the adapters' terms to y."""


@dataclass(frozen=True)
class Point:
    """One step."""

    num_rows: int
    num_adapters: int
    ranks: tuple[int, ...]
    """Adapter d has rank `ranks[d % len(ranks)]`."""
    skewed: bool = False
    """Whether adapter d has rows in proportion to 1 / (d + 1), else all have the same."""
    base_share: float = 0.0
    """Share of rows without an adapter."""
    max_rank: int = 64
    """Highest rank of the pool."""

    @property
    def rank_name(self) -> str:
        return "+".join(map(str, self.ranks))

    def num_pages(self, adapter: int) -> int:
        return -(-self.ranks[adapter % len(self.ranks)] // 16)

    def pages(self) -> list[tuple[int, ...]]:
        """Of each adapter, scattered over the pool."""
        ends = np.cumsum([self.num_pages(d) for d in range(self.num_adapters)]).tolist()
        order = np.random.default_rng(1).permutation(ends[-1]).tolist()
        return [tuple(order[end - self.num_pages(d) : end]) for d, end in enumerate(ends)]

    def slots(self) -> npt.NDArray[np.int32]:
        """Of each row; prompts lie side by side, decoding rows do not. Every adapter has one if rows last."""
        rng = np.random.default_rng(0)
        weights = 1.0 / np.arange(1, self.num_adapters + 1) if self.skewed else np.ones(self.num_adapters)
        num_routed = max(1, round(self.num_rows * (1.0 - self.base_share)))
        first = np.arange(min(num_routed, self.num_adapters))
        more = rng.choice(self.num_adapters, num_routed - len(first), p=weights / weights.sum())
        slots = np.concatenate([first, more, np.full(self.num_rows - num_routed, -1)]).astype(np.int32)
        return np.sort(slots) if self.num_rows >= 512 else rng.permutation(slots)


def points(which: str) -> Iterator[Point]:
    """The points of the table: those of the goals first, then one dimension at a time, then all of them."""
    yield from (Point(32, 32, (16,)), Point(64, 64, (64,)), Point(32, 1, (16,)), Point(8192, 1, (16,)))
    yield from (Point(32, 32, (8,)), Point(32, 32, (8,), max_rank=16))
    mixed = (8, 16, 32, 64)
    if which == "few":
        yield from (Point(rows, min(rows, 8), (16,)) for rows in (1, 8, 128, 512, 2048, 8192))
        yield from (Point(64, adapters, (16,)) for adapters in (1, 4, 16, 64))
        yield from (Point(64, 32, ranks) for ranks in ((32,), (64,), mixed))
        yield Point(64, 32, mixed, skewed=True)
        yield from (Point(rows, 8, (16,), base_share=0.5) for rows in (64, 2048))
        return
    for num_rows in (1, 8, 32, 64, 128, 256, 512, 2048, 8192):
        for num_adapters in (1, 4, 8, 16, 32, 64):
            if num_adapters > num_rows:
                continue
            for ranks in ((8,), (16,), (32,), (64,), mixed):
                for skewed in (False, True) if num_adapters > 1 else (False,):
                    for base_share in (0.0, 0.5):
                        yield Point(num_rows, num_adapters, ranks, skewed, base_share)


@dataclass(frozen=True)
class Timing:
    """Microseconds of one layer."""

    median: float
    least: float
    most: float


class Bench:
    """Everything of one point on the device."""

    def __init__(self, point: Point, layer: dict[str, SiteShape], device: torch.device, dtype: torch.dtype):
        from manylora_kernels.routed import RoutedMix  # imports triton, after the interpreter was chosen

        self.point, self.layer, self.device, self.dtype = point, layer, device, dtype
        self.slots, self.pages = point.slots(), point.pages()
        self.scales = np.full(point.num_rows, 0.5, dtype=np.float32)
        max_pages = max(-(-point.max_rank // 16), *(len(mine) for mine in self.pages))
        mix = RoutedMix.build(self.slots, self.scales, [self.pages], point.num_adapters, max_pages, device)
        # Measured side by side; a captured graph would never take the vendor's products by itself.
        self.mix, self.one_adapter = replace(mix, one_adapter=None), mix.one_adapter
        torch.manual_seed(0)
        self.x = {name: self._randn(point.num_rows, site.num_inputs) for name, site in layer.items()}
        self.y = {name: self._randn(point.num_rows, site.num_outputs) for name, site in layer.items()}
        num_layers = min(32, -(-CACHE_BYTES // self.weight_bytes()))
        self.layers = [self._pools() for _ in range(num_layers if device.type == "cuda" else 1)]
        self.step = Step(
            rows=tuple(
                torch.from_numpy(np.flatnonzero(self.slots == d)).to(device) for d in range(len(self.pages))
            ),
            scales=torch.from_numpy(self.scales[:, None]).to(device, dtype),
            pages=self.pages,
        )

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _pools(self) -> dict[str, SitePool]:
        num_pages = sum(map(len, self.pages))
        return {
            name: SitePool(
                self._randn(num_pages, site.num_linears, 16, site.num_inputs) / site.num_inputs**0.5,
                self._randn(num_pages, 16, site.num_outputs) / 4,
                site.widths,
            )
            for name, site in self.layer.items()
        }

    def weight_bytes(self) -> int:
        """Of the adapters that have rows, in one layer: whole pages, as they are read."""
        num_pages = sum(len(self.pages[slot]) for slot in np.unique(self.slots).tolist() if slot >= 0)
        rows = sum(site.num_linears * site.num_inputs + site.num_outputs for site in self.layer.values())
        return num_pages * 16 * rows * self.dtype.itemsize

    def moved_bytes(self) -> int:
        """The least that a layer moves: the weights, x once, y there and back."""
        num_routed = int((self.slots >= 0).sum())
        row = sum(site.num_inputs + 2 * site.num_outputs for site in self.layer.values())
        return self.weight_bytes() + num_routed * row * self.dtype.itemsize

    def forms(self) -> dict[str, Form]:
        """Ours first, then the peers that can be run here."""
        from manylora_kernels import gpu  # imports triton, after the interpreter was chosen

        def ours(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Callable[[], None]:
            return lambda: gpu.add_lora(y, x, pool, self.mix, 0)

        found: dict[str, Form] = {"manylora": ours}
        one = self.one_adapter
        if one is not None:
            found["manylora, one adapter"] = lambda y, x, pool: lambda: one.add_lora(y, x, pool, 0)
        for name, peer in PEERS.items():
            if available(name, self.dtype):
                found[name] = lambda y, x, pool, peer=peer: peer(y, x, pool, self.step)
        return found

    def all_layers(self, form: Form) -> Callable[[], None]:
        """One form over all layers, one after the other."""
        runs = [
            form(self.y[site], self.x[site], pool) for pools in self.layers for site, pool in pools.items()
        ]

        def run() -> None:
            for mine in runs:
                mine()

        return run

    def check(self, form: Form) -> float:
        """The largest error of the first layer, as a share of the largest result, against float64.

        Raises:
            AssertionError: an error above the tolerance, or a row without an adapter that has changed.
        """
        worst, tolerance = 0.0, TOLERANCE[self.dtype]
        picks = np.unique(np.linspace(0, self.point.num_rows - 1, 48).astype(np.int64))
        for name, pool in self.layers[0].items():
            y = self.y[name].clone()
            form(y, self.x[name], pool)()
            for t in picks.tolist():
                expected, slot = self.y[name][t].double(), int(self.slots[t])
                if slot < 0:
                    assert torch.equal(y[t], self.y[name][t]), f"{name}: row {t} has no adapter"
                    continue
                mine = list(self.pages[slot])
                a, b = pool.a[mine].double(), pool.b[mine].double()
                h = torch.einsum("k,psrk->spr", self.x[name][t].double(), a).flatten(1)
                parts = b.flatten(0, 1).split(list(pool.widths), dim=1)
                term = torch.cat([h[s] @ part for s, part in enumerate(parts)])
                expected = expected + float(self.scales[t]) * term
                error = ((y[t].double() - expected).abs().max() / expected.abs().max()).item()
                worst = max(worst, error)
        assert worst <= tolerance, (
            f"{self.point}: error {worst:.2e} of the largest result, allowed {tolerance}"
        )
        return worst


def graph_of(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same as one CUDA graph; on a CPU as it is."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_in_turn(
    runs: dict[str, Callable[[], None]], device: torch.device, num_layers: int, repeats: int
) -> dict[str, Timing]:
    """Microseconds a layer of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_time(run, device) / num_layers)
    return {name: Timing(statistics.median(mine), min(mine), max(mine)) for name, mine in times.items()}


def _time(run: Callable[[], None], device: torch.device) -> float:
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


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written: what a kernel can hope for."""
    size = (1 << 30) if device.type == "cuda" else (1 << 20)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = [_time(lambda: target.copy_(source), device) * 1e-6 for _ in range(12)]
    return 2 * size / min(seconds[2:])


def measure(
    point: Point,
    layer: dict[str, SiteShape],
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    repeats: int,
) -> list[dict[str, object]]:
    """Check every form at one point, then time them in turn, and give a row for each."""
    bench = Bench(point, layer, device, dtype)
    forms = bench.forms()
    errors = {name: bench.check(form) for name, form in forms.items()}
    runs = {name: graph_of(bench.all_layers(form), device) for name, form in forms.items()}
    timings = time_in_turn(runs, device, len(bench.layers), repeats)
    moved = bench.moved_bytes()
    return [
        {
            "rows": point.num_rows,
            "adapters": point.num_adapters,
            "rank": point.rank_name,
            "max_rank": point.max_rank,
            "skewed": int(point.skewed),
            "base_share": point.base_share,
            "form": name,
            "median_us": round(timing.median, 2),
            "least_us": round(timing.least, 2),
            "most_us": round(timing.most, 2),
            "moved_bytes": moved,
            "share_of_bandwidth": round(moved / (timing.median * 1e-6) / bandwidth, 4),
            "error": f"{errors[name]:.1e}",
        }
        for name, timing in timings.items()
    ]


def run_points(
    chosen: Iterator[Point],
    layer: dict[str, SiteShape],
    device: torch.device,
    dtype: torch.dtype,
    budget_s: float,
    repeats: int,
) -> Iterator[dict[str, object]]:
    """The rows of every point, until the time is up; points that come twice are measured once."""
    begin, seen = time.monotonic(), set()
    bandwidth = measured_bandwidth(device)
    for point in chosen:
        if point in seen:
            continue
        if time.monotonic() - begin > budget_s:
            print(f"time is up before {point}", file=sys.stderr)
            return
        seen.add(point)
        with torch.inference_mode():
            yield from measure(point, layer, device, dtype, bandwidth, repeats)


def write_rows(rows: list[dict[str, object]], path: Path, where: dict[str, object]) -> None:
    """Append to a CSV, each row with where and with what it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*where, *rows[0]])
        if is_new:
            writer.writeheader()
        writer.writerows({**where, **row} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu-logic", action="store_true", help="tiny shapes in triton's interpreter")
    parser.add_argument("--points", choices=["few", "all"], default="few")
    parser.add_argument("--budget-s", type=float, default=240.0, help="seconds, then no new point is begun")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a CSV to append to")
    args = parser.parse_args()
    if args.cpu_logic:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--cpu-logic runs the logic on a CPU)")
        return
    from loadtest import environment  # a neighbour of this file

    where = {
        "date": datetime.date.today().isoformat(),
        "commit": environment.commit(),
        "device": "interpreter" if args.cpu_logic else environment.device_name(),
        "torch": torch.__version__,
        "triton": environment.package_version("triton"),
    }
    device = torch.device("cpu" if args.cpu_logic else "cuda")
    dtype = torch.float32 if args.cpu_logic else torch.bfloat16
    chosen = points(args.points)
    if args.cpu_logic:
        chosen = iter([Point(5, 2, (8, 24)), Point(3, 3, (16,), True, 0.5, 16)])
    layer = TINY_LAYER if args.cpu_logic else LAYER
    repeats = 1 if args.cpu_logic else args.repeats
    rows = []
    print(" ".join(f"{name}={value}" for name, value in where.items()))
    for row in run_points(chosen, layer, device, dtype, args.budget_s, repeats):
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        rows.append(row)
    if args.out and rows:
        write_rows(rows, args.out, where)


if __name__ == "__main__":
    main()
