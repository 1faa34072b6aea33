"""Prove and measure everything on a GPU, in one run of at most 8 minutes.

    python bench/peers.py                            once, where there is a network
    python bench/gpu_suite.py --save                 all parts; rows, goals and a plot go to bench/results
    python bench/gpu_suite.py --quick                the goals' kernels in about a minute
    python bench/gpu_suite.py --cpu-logic            the same logic on tiny shapes in triton's interpreter

Every form is compared with float64 before it is timed. Forms take turns, each in a CUDA graph over more
layers of different weights than the caches hold; times are medians with the least and the most. Parts run in
the order of the goals, so that a run that is cut short has the goals' rows. The status is 1 where a form or a
proof failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gpu.budget import Budget, Deadline
from gpu.peer_modules import FOLDER
from loadtest import environment
from loadtest.csv_file import append_csv
from loadtest.origin import RESULTS, Origin
from loadtest.table import Table

if TYPE_CHECKING:
    from gpu.rows import Context, Row

SHARES = {"goals": 70, "exposed": 60, "pool-rank": 20, "model": 120, "copy": 25, "proofs": 40, "table": 125}
"""The parts in their order, and seconds of each in a run of 460."""
QUICK = ("goals", "exposed", "pool-rank")
INTERPRETER = "interpreter"
_COMPILE_SHARE = 0.25
"""Of the time, at most, for compiling beforehand."""
_SLOW_IN_INTERPRETER = frozenset({"vllm", "vllm, batch invariant"})
"""Thousands of programs that do nothing: half a minute for a tiny step."""

Part = Callable[["Context", Deadline], Iterator["Row"]]


def parts() -> dict[str, Part]:
    """By name; what they import imports triton, so the interpreter must be chosen before."""
    from gpu import part_copy, part_exposed, part_kernels, part_model, part_proofs, shapes

    def points(context: Context, of_gpu: Iterable[shapes.Point]) -> Iterable[shapes.Point]:
        return shapes.TINY_POINTS if context.is_tiny else of_gpu

    def goals(context: Context, deadline: Deadline) -> Iterator[Row]:
        yield from part_kernels.run(context, deadline, points(context, shapes.GOAL_POINTS))

    def pool_rank(context: Context, deadline: Deadline) -> Iterator[Row]:
        chosen = points(context, shapes.POOL_RANK_POINTS)
        yield from part_kernels.run(context, deadline, list(chosen)[-2:], "pool rank")

    def table(context: Context, deadline: Deadline) -> Iterator[Row]:
        first = list(shapes.GOAL_POINTS)
        rest = [point for point in shapes.few_points() if point not in first]
        peft = shapes.TINY_POINTS[0] if context.is_tiny else first[0]
        yield from part_kernels.peft(context, peft)
        yield from part_kernels.run(context, deadline, [] if context.is_tiny else rest)

    return {
        "goals": goals,
        "exposed": part_exposed.run,
        "pool-rank": pool_rank,
        "model": part_model.run,
        "copy": part_copy.run,
        "proofs": part_proofs.run,
        "table": table,
    }


def make_context(arguments: argparse.Namespace) -> Context:
    """Look at the device and measure its bandwidth."""
    from gpu.clock import measured_bandwidth
    from gpu.rows import Context, label_of
    from gpu.shapes import LLAMA_LAYER, TINY_LAYER

    tiny = bool(arguments.cpu_logic)
    device = torch.device("cpu" if tiny else "cuda")
    name = INTERPRETER if tiny else environment.device_name()
    return Context(
        origin=Origin.now("" if tiny else label_of(name), device=name),
        triton=environment.package_version("triton"),
        device=device,
        # The interpreter computes bfloat16 wrongly.
        dtype=torch.float16 if tiny else torch.bfloat16,
        layer=TINY_LAYER if tiny else LLAMA_LAYER,
        bandwidth=measured_bandwidth(device),
        peers=arguments.peers,
        repeats=1 if tiny else 7 if arguments.quick else 15,
        proofs=3 if tiny else 1000,
        is_tiny=tiny,
        leave_out=_SLOW_IN_INTERPRETER if tiny else frozenset(),
    )


def compile_all(context: Context, chosen: Sequence[str], num_processes: int, limit_s: float) -> None:
    """Have the kernels of the parts' points compiled, so that the time goes into measuring."""
    from gpu import forms, shapes
    from gpu.prewarm import Job, prewarm

    points: dict[shapes.Point, None] = {}
    if context.is_tiny:
        points |= dict.fromkeys(shapes.TINY_POINTS)
    else:
        points |= dict.fromkeys(shapes.GOAL_POINTS)
        points |= dict.fromkeys(shapes.POOL_RANK_POINTS if "pool-rank" in chosen else ())
        points |= dict.fromkeys(shapes.few_points() if "table" in chosen else ())
    names = [name for name in forms.makers(context.peers) if name not in context.leave_out]
    jobs = [
        Job(point, name, context.layer, context.device.type, context.dtype, context.peers)
        for point in points
        for name in names
    ]
    done = prewarm(jobs, num_processes, limit_s)
    print(f"# compiled beforehand: {done} of {len(jobs)} forms at points", flush=True)


def run(context: Context, chosen: Sequence[str], budget_s: float, keep: Callable[[Row], None]) -> list[Row]:
    """Run the parts one after the other; every row is kept as soon as it is there."""
    known, rows = parts(), []
    budget = Budget(budget_s, {name: SHARES[name] for name in SHARES if name in chosen})
    for name in SHARES:
        if name not in chosen:
            continue
        deadline = budget.begin(name)
        print(f"# {name}: {deadline.left_s:.0f} s", flush=True)
        for row in known[name](context, deadline):
            rows.append(row)
            keep(row)
            print(line_of(row), flush=True)
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def line_of(row: Row) -> str:
    """A row for people: what is set."""
    names = ("part", "form", "rows", "adapters", "rank", "pool_rank", "skewed", "base_share")
    numbers = ("median_us", "least_us", "most_us", "extra_us", "floor_us", "error")
    words = [str(getattr(row, name)) for name in names if getattr(row, name) not in (None, "")]
    words += [f"{name}={value:.4g}" for name in numbers if (value := getattr(row, name)) is not None]
    return " | ".join([*words, row.result])


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the goals, and save.

    Returns: the exit status.
    """
    arguments = _parse(argv)
    if arguments.cpu_logic:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--cpu-logic runs the logic on a CPU)")
        return 0
    from gpu.goals import Verdict, judge

    context = make_context(arguments)
    out: Path | None = arguments.out or (RESULTS if arguments.save and not context.is_tiny else None)
    wide = context.bandwidth
    print(f"{context.origin.device}, commit {context.origin.commit}, torch {context.origin.torch}, ", end="")
    print(f"triton {context.triton}; reads {wide.read / 1e12:.2f} TB/s ({wide.read_by}), ", end="")
    print(f"copies {wide.copy / 1e12:.2f} TB/s", flush=True)
    if context.leave_out:
        print(f"left out here: {', '.join(sorted(context.leave_out))}")

    def keep(row: Row) -> None:
        if out is not None:
            append_csv(out / "gpu_suite.csv", [row])

    begin = time.monotonic()
    if arguments.compilers:
        compile_all(context, arguments.parts, arguments.compilers, _COMPILE_SHARE * arguments.budget_s)
    left_s = arguments.budget_s - (time.monotonic() - begin)
    rows = run(context, arguments.parts, left_s, keep)
    verdicts = judge(rows, timed=not context.is_tiny)
    print(Table(["goal", "wanted", "floor", "found", "verdict"], [list(found) for found in verdicts]).plain())
    if out is not None:
        names = ("goal", "wanted", "floor", "found", "verdict")
        kept = [
            Verdict(**asdict(context.origin), **dict(zip(names, found, strict=True))) for found in verdicts
        ]
        append_csv(out / "gpu_goals.csv", kept)
        from gpu.plot import draw

        label = context.origin.label or INTERPRETER
        draw(rows, out / f"gpu_kernels_{label}.png", f"Adapters' part of a layer, {context.origin.device}")
    return int(any(row.is_bad for row in rows))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu-logic", action="store_true", help="tiny shapes in triton's interpreter")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, in about a minute")
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), help="these parts only")
    parser.add_argument("--budget-s", type=float, help="seconds, then nothing more is begun; 430, quick 50")
    parser.add_argument("--peers", type=Path, default=FOLDER, help="where bench/peers.py has put its files")
    parser.add_argument("--save", action="store_true", help="rows, goals and plot into bench/results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="into this folder instead")
    parser.add_argument(
        "--compilers", type=int, help="processes that compile first; by the processors at hand"
    )
    arguments = parser.parse_args(argv)
    if arguments.compilers is None:
        # The interpreter compiles nothing.
        arguments.compilers = 0 if arguments.cpu_logic else max(0, min(12, (os.cpu_count() or 1) - 2))
    if arguments.parts is None:
        arguments.parts = QUICK if arguments.quick else tuple(SHARES)
    if arguments.budget_s is None:
        arguments.budget_s = 50.0 if arguments.quick else 430.0
    if arguments.cpu_logic and arguments.out and arguments.out.resolve() == RESULTS.resolve():
        parser.error("--out: an interpreter's times are no results")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
