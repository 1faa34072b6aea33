"""Measure how long an adapter takes from host memory into the device pool, beside a plain copy of its bytes.

    python bench/adapter_copy.py [--ranks 8 16 64] [--repeats 30] [--out bench/results/adapter_copy.csv]
    python bench/adapter_copy.py --cpu-logic          tiny shapes on a CPU, where times mean nothing

The shapes are Llama-3-8B's, 32 layers, all linears. Every placement is first checked bit by bit. Then it and
one contiguous copy of as many page-locked bytes, on a stream of its own, take turns: from the call until the
device is done, as the host's clock has it, with the device idle before.
"""

from __future__ import annotations

import csv
import datetime
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.placement import Placement
from manylora.adapters.pool_tensors import PoolTensors, runs_of
from manylora.adapters.weights import AdapterWeights, allocate
from manylora.model.parts import num_pages_of
from manylora.model.spec import ModelSpec, SiteKind
from manylora_kernels import SiteShape

from bench.arguments import make_parser
from bench.gpu.shapes import LLAMA_LAYER, TINY_LAYER
from bench.loadtest import environment

GOAL = 1.2
"""Times the plain copy, at most."""


@dataclass(frozen=True)
class Times:
    """Of one way to copy, in microseconds, one for each repeat."""

    total: list[float]
    """Until the device is done."""
    queued: list[float]
    """Until the call returns: for so long a step that is to be queued waits."""


def spec_of(layer_shapes: Mapping[str, SiteShape], num_layers: int) -> ModelSpec:
    """A model of equal layers."""
    kinds = tuple(
        SiteKind(name=name, num_layers=num_layers, in_features=site.num_inputs, out_features=site.widths)
        for name, site in layer_shapes.items()
    )
    return ModelSpec(kinds=kinds, linears={})


def make_weights(spec: ModelSpec, rank: int, dtype: torch.dtype, device: torch.device) -> AdapterWeights:
    """A random adapter on all linears, page-locked for a GPU.

    Raises:
        RuntimeError: no memory can be page-locked.
    """
    buffer, kinds = allocate(spec.kinds, [rank] * len(spec.kinds), dtype, pin=device.type == "cuda")
    if device.type == "cuda" and not buffer.is_pinned():
        raise RuntimeError("no memory can be page-locked here: there is nothing to compare with")
    buffer.copy_(torch.randn(buffer.shape, dtype=dtype, device=device))
    return AdapterWeights(version=str(rank), scale=1.0, max_rank=rank, buffer=buffer, kinds=kinds)


def make_pool(
    spec: ModelSpec, rank: int, dtype: torch.dtype, device: torch.device, scattered: bool
) -> DevicePool:
    """A pool with room for an adapter of `rank`: in one run of pages, or in pages that lie apart."""
    tensors = PoolTensors(spec, 2, rank, dtype, device, staged=True)
    pool = DevicePool(spec.kinds, 2, rank, tensors)
    if scattered:
        buffer, kinds = allocate(spec.kinds, [1] * len(spec.kinds), dtype, pin=False)
        one_page = AdapterWeights(version="", scale=1.0, max_rank=1, buffer=buffer, kinds=kinds)
        for page, placement in enumerate([pool.try_place(one_page) for _ in range(pool.num_pages)]):
            assert placement is not None, "the pool has fewer pages than it says"
            if page % 2 == 0:
                pool.free(placement)
    return pool


def tensors_of(pool: DevicePool) -> PoolTensors:
    """Those of this process."""
    assert isinstance(pool.tensors, PoolTensors), "a pool of somewhere else"
    return pool.tensors


def check(pool: DevicePool, weights: AdapterWeights) -> Placement:
    """Place the adapter, compare its pages with it, and free them.

    Raises:
        AssertionError: a bit is another.
    """
    placement = place(pool, weights)
    tensors = tensors_of(pool)
    tensors.await_copy(placement)
    rank_pages = placement.pages[: pool.num_kinds]
    for kind, source, pages in zip(tensors.kinds, weights.kinds, rank_pages, strict=True):
        assert source is not None, "an adapter on all linears"
        for name, tensor in source.parts.items():
            assert torch.equal(kind[name][:, list(pages)], tensor.to(tensors.device)), (
                "the adapter has not arrived whole"
            )
    pool.free(placement)
    return placement


def place(pool: DevicePool, weights: AdapterWeights) -> Placement:
    """What is measured. The pool has room."""
    placement = pool.try_place(weights)
    assert placement is not None, "no room"
    return placement


class PlainCopy:
    """One contiguous copy of an adapter's buffer to the device, on a stream of its own."""

    def __init__(self, source: torch.Tensor, device: torch.device) -> None:
        self.source = source
        self.target = torch.empty(source.shape, dtype=source.dtype, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self) -> torch.cuda.Event | None:
        if self.stream is None:
            self.target.copy_(self.source)
            return None
        with torch.cuda.stream(self.stream):
            self.target.copy_(self.source, non_blocking=True)
            return self.stream.record_event()


def time_in_turn(pool: DevicePool, weights: AdapterWeights, repeats: int) -> tuple[Times, Times]:
    """Of placing and of the plain copy, which take turns; the first of each is not counted."""
    tensors = tensors_of(pool)
    plain = PlainCopy(weights.buffer, tensors.device)
    placed_times, plain_times = Times([], []), Times([], [])
    for _ in range(repeats + 1):
        _wait(tensors.device)
        begin = time.perf_counter()
        done = plain.run()
        _note(plain_times, begin, done)
        _wait(tensors.device)
        begin = time.perf_counter()
        placement = place(pool, weights)
        _note(placed_times, begin, tensors.copied(placement))
        pool.free(placement)
    for times in (placed_times, plain_times):
        del times.total[0], times.queued[0]
    return placed_times, plain_times


def _note(times: Times, begin: float, done: torch.cuda.Event | None) -> None:
    times.queued.append((time.perf_counter() - begin) * 1e6)
    if done is not None:
        done.synchronize()
    times.total.append((time.perf_counter() - begin) * 1e6)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    device: torch.device,
    layer_shapes: Mapping[str, SiteShape],
    ranks: Sequence[int],
    repeats: int,
    *,
    num_layers: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, object]]:
    """Check and time adapters of each rank, into pages in one run and, where there are several, apart.

    Args:
        device: a GPU; on a CPU all runs as on one, and the times mean nothing.
        layer_shapes: the sites of one layer by name.
        ranks: of the adapters, on all linears.
        repeats: how often each is timed.

    Returns:
        A row for each rank and arrangement, as `_row` makes it.
    """
    spec = spec_of(layer_shapes, num_layers)
    rows = []
    for rank in ranks:
        weights = make_weights(spec, rank, dtype, device)
        for scattered in (False, True) if num_pages_of(rank) > 1 else (False,):
            pool = make_pool(spec, rank, dtype, device, scattered)
            placement = check(pool, weights)
            placed, plain = time_in_turn(pool, weights, repeats)
            num_runs = len(list(runs_of(placement.pages[0])))
            rows.append(_row(weights, num_runs, placed, plain))
    return rows


def _row(weights: AdapterWeights, num_runs: int, placed: Times, plain: Times) -> dict[str, object]:
    """The numbers of one rank and arrangement.

    `runs` are of pages of a kind; `median_us`, `least_us` and `most_us` are of placing, and `queued_us` until
    its call returns; `ratio` is that of the medians.
    """
    median, plain_median = statistics.median(placed.total), statistics.median(plain.total)
    return {
        "rank": weights.max_rank,
        "runs": num_runs,
        "adapter_bytes": weights.num_bytes,
        "median_us": round(median, 1),
        "least_us": round(min(placed.total), 1),
        "most_us": round(max(placed.total), 1),
        "queued_us": round(statistics.median(placed.queued), 1),
        "plain_median_us": round(plain_median, 1),
        "plain_least_us": round(min(plain.total), 1),
        "plain_most_us": round(max(plain.total), 1),
        "plain_gb_s": round(weights.num_bytes / plain_median / 1e3, 2),
        "ratio": round(median / plain_median, 3),
    }


def write_rows(rows: Sequence[Mapping[str, object]], path: Path, where: Mapping[str, object]) -> None:
    """Append to a CSV, each row with where and with what it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*where, *rows[0]])
        if is_new:
            writer.writeheader()
        writer.writerows({**where, **row} for row in rows)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--cpu-logic", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="a CSV to append to")
    args = parser.parse_args()
    if not args.cpu_logic and not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--cpu-logic runs the logic on a CPU)")
        return
    where = {
        "date": datetime.date.today().isoformat(),
        "commit": environment.commit(),
        "device": "cpu logic" if args.cpu_logic else environment.device_name(),
        "torch": torch.__version__,
    }
    print(" ".join(f"{name}={value}" for name, value in where.items()))
    if args.cpu_logic:
        rows = measure(torch.device("cpu"), TINY_LAYER, args.ranks, 2, num_layers=2, dtype=torch.float32)
    else:
        try:
            rows = measure(torch.device("cuda"), LLAMA_LAYER, args.ranks, args.repeats)
        except RuntimeError as error:
            sys.exit(str(error))
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        if not args.cpu_logic:
            met = "met" if float(str(row["ratio"])) <= GOAL else "missed"
            print(f"  goal of {GOAL} times the plain copy: {met}")
    if args.out:
        write_rows(rows, args.out, where)


if __name__ == "__main__":
    main()
