"""Prove and measure everything on a GPU, in one run of at most 8 minutes.

    python bench/peers.py                            once, where there is a network
    python bench/gpu_suite.py --save                 all parts; rows, goals and a plot go to bench/results
    python bench/gpu_suite.py --quick                our kernels at the goals' steps, in about a minute
    python bench/gpu_suite.py --cpu-logic            the same logic on tiny shapes in triton's interpreter

Every form is compared with float64 before it is timed. Forms take turns, each in a CUDA graph over more
layers of different weights than the caches hold; times are medians with the least and the most. Parts run in
the order of the goals, ours before the peers', and goals and plot are written after each: a run that is cut
short has what it has found. The status is 1 where a form or a proof failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from gpu.budget import Budget, Deadline
from gpu.peer_modules import FOLDER
from loadtest import environment
from loadtest.csv_file import append_csv
from loadtest.origin import RESULTS, Origin
from loadtest.table import Table

if TYPE_CHECKING:
    from gpu import shapes
    from gpu.goals import Whole
    from gpu.rows import Context, Row

SHARES = {
    "goals": 30,
    "exposed": 45,
    "pool-rank": 10,
    "copy": 20,
    "model": 30,
    "peers": 90,
    "proofs": 50,
    "exposed-peers": 25,
    "table": 100,
}
"""The parts in their order, and the share of each in a run's time."""
RESERVED_S = {"model": 110.0}
"""Beside the share: the model is made, compiled and recorded before its first step."""
QUICK = ("goals", "exposed", "pool-rank")
INTERPRETER = "interpreter"
_COMPILE_SHARE = 0.3
"""Of the time, at most, for compiling beforehand."""
_SLOW_IN_INTERPRETER = frozenset({"vllm", "vllm, batch invariant"})
"""Thousands of programs that do nothing: half a minute for a tiny step."""

Part = Callable[["Context", Deadline], Iterator["Row"]]


def parts() -> dict[str, Part]:
    """By name; what they import imports triton, so the interpreter must be chosen before."""
    from gpu import forms, part_copy, part_exposed, part_kernels, part_model, part_proofs, shapes

    def points(context: Context, of_gpu: Iterable[shapes.Point]) -> Iterable[shapes.Point]:
        return shapes.TINY_POINTS if context.is_tiny else of_gpu

    def goals(context: Context, deadline: Deadline) -> Iterator[Row]:
        chosen = points(context, shapes.GOAL_POINTS)
        yield from part_kernels.run(context, deadline, chosen, part_kernels.ALONE, forms.PEERS)

    def pool_rank(context: Context, deadline: Deadline) -> Iterator[Row]:
        yield from part_kernels.pool_rank(context, points(context, shapes.POOL_RANK_POINTS))

    def peers(context: Context, deadline: Deadline) -> Iterator[Row]:
        yield from part_kernels.run(context, deadline, points(context, shapes.COMPARED_POINTS))

    def table(context: Context, deadline: Deadline) -> Iterator[Row]:
        rest = [point for point in shapes.few_points() if point not in shapes.COMPARED_POINTS]
        peft = shapes.TINY_POINTS[0] if context.is_tiny else shapes.GOAL_POINTS[0]
        yield from part_kernels.peft(context, peft)
        yield from part_kernels.run(context, deadline, [] if context.is_tiny else rest)

    return {
        "goals": goals,
        "exposed": part_exposed.run,
        "pool-rank": pool_rank,
        "copy": part_copy.run,
        "model": part_model.run,
        "peers": peers,
        "proofs": part_proofs.run,
        "exposed-peers": part_exposed.run_with_peers,
        "table": table,
    }


def whole_run(context: Context) -> Whole:
    """What a whole run has."""
    from gpu import forms, part_exposed, part_kernels, part_proofs, shapes
    from gpu.goals import Whole

    num_proofs, read = part_proofs.num_proofs(context), context.bandwidth.read
    if not context.is_tiny:
        return Whole(num_proofs=num_proofs, read=read)
    checked = [(part_exposed.PART, part_exposed.IN_TURN, shapes.TINY_POINTS[0])]
    for part in (part_kernels.ALONE, part_kernels.KERNELS):
        checked += [(part, forms.OURS, point) for point in shapes.TINY_POINTS]
    return Whole(num_proofs=num_proofs, compared=shapes.TINY_POINTS, checked=tuple(checked), read=read)


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
    from gpu import prewarm

    jobs = [
        prewarm.Job(point, name, context.layer, context.device.type, context.dtype, context.peers)
        for point, name in dict.fromkeys(_compiled(context, chosen))
        if name not in context.leave_out
    ]
    model = prewarm.ModelJob(context.device.type, context.dtype, context.is_tiny)
    begin = time.monotonic()
    done = prewarm.prewarm(jobs, num_processes, limit_s, model if "model" in chosen else None)
    seconds = time.monotonic() - begin
    print(f"# compiled beforehand: {done} of {len(jobs)} forms at points, {seconds:.0f} s", flush=True)


def _compiled(context: Context, chosen: Sequence[str]) -> Iterator[tuple[shapes.Point, str]]:
    """Points and forms, in the order in which they are measured."""
    from gpu import forms, part_exposed, part_proofs, prewarm, shapes

    names = list(forms.makers(context.peers))
    ours = [name for name in names if name not in forms.PEERS]

    def of(
        part: str, points: Iterable[shapes.Point], forms_of: Iterable[str]
    ) -> Iterator[tuple[shapes.Point, str]]:
        if part in chosen:
            used = shapes.TINY_POINTS if context.is_tiny else points
            yield from ((point, name) for point in used for name in forms_of)

    yield from of("goals", shapes.GOAL_POINTS, ours)
    yield from of("exposed", part_exposed.POINTS, (*ours, *prewarm.MORE))
    yield from of("pool-rank", shapes.POOL_RANK_POINTS, ours)
    yield from of("peers", shapes.COMPARED_POINTS, names)
    yield from of("proofs", part_proofs.POINTS.values(), (*ours, *prewarm.MORE))
    yield from of("exposed-peers", part_exposed.POINTS, (forms.VLLM, forms.SGLANG_V2))
    yield from of("table", shapes.few_points(), names)


def run(
    context: Context,
    chosen: Sequence[str],
    budget_s: float,
    keep: Callable[[Row], None],
    part_is_done: Callable[[], None],
) -> None:
    """Run the parts one after the other; every row is kept as soon as it is there.

    Args:
        part_is_done: called after each.
    """
    from gpu.attempt import guarded

    known = parts()
    shares = {name: float(SHARES[name]) for name in SHARES if name in chosen}
    budget = Budget(budget_s, shares, reserved_s=RESERVED_S)
    for name in shares:
        deadline, begin = budget.begin(name), time.monotonic()
        print(f"# {name}: {deadline.left_s:.0f} s", flush=True)
        failed = partial(_failed, context, name)
        for row in guarded(known[name](context, deadline), failed):
            keep(row)
            print(line_of(row), flush=True)
        _settle(context)
        part_is_done()
        print(f"# {name}: took {time.monotonic() - begin:.0f} s", flush=True)


def _failed(context: Context, part: str, why: str) -> Row:
    return context.row(part, "whole part", result=why)


def _settle(context: Context) -> None:
    """Give memory back and measure the bandwidth again; the larger is kept."""
    from gpu.attempt import attempt
    from gpu.clock import measured_bandwidth

    def settle() -> None:
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        context.bandwidth = context.bandwidth.or_larger(measured_bandwidth(context.device))

    if isinstance(why := attempt(settle), str):
        print(f"# {why}", flush=True)


class Report:
    """The rows of a run so far, and what is written and printed of them.

    Args:
        out: the folder of the files; None: nothing is written.
    """

    def __init__(self, context: Context, out: Path | None) -> None:
        self.context, self.out = context, out
        self.rows: list[Row] = []

    def keep(self, row: Row) -> None:
        """One more."""
        self.rows.append(row)
        if self.out is not None:
            append_csv(self.out / "gpu_suite.csv", [row])

    def judged(self) -> list[tuple[str, str, str, str, str]]:
        """The goals by the rows so far."""
        from gpu.goals import judge

        return judge(self.rows, whole_run(self.context), timed=not self.context.is_tiny)

    def write(self) -> None:
        """The goals' file and the plot, in place of those that this run has written before."""
        from gpu import verdict_file
        from gpu.attempt import attempt

        if self.out is None or not self.rows:
            return
        origin, out = self.context.origin, self.out
        verdict_file.write(out / "gpu_goals.csv", origin, self.judged())

        def draw() -> None:
            from gpu import plot  # matplotlib may be missing

            path = out / f"gpu_kernels_{origin.label or INTERPRETER}.png"
            plot.draw(self.rows, path, f"Adapters' part of a layer, {origin.device}")

        if isinstance(why := attempt(draw), str):
            print(f"# no plot: {why}", flush=True)

    def tell(self) -> None:
        """Print the goals."""
        header = ["goal", "wanted", "floor", "found", "verdict"]
        print(Table(header, [list(found) for found in self.judged()]).plain(), flush=True)


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
    context = make_context(arguments)
    _introduce(context)
    out: Path | None = arguments.out or (RESULTS if arguments.save and not context.is_tiny else None)
    report = Report(context, out)
    # Whoever ends the run by a signal gets what it has found.
    signal.signal(signal.SIGTERM, _end)
    begin = time.monotonic()
    try:
        if arguments.compilers:
            compile_all(context, arguments.parts, arguments.compilers, _COMPILE_SHARE * arguments.budget_s)
        left_s = arguments.budget_s - (time.monotonic() - begin)
        run(context, arguments.parts, left_s, report.keep, report.write)
    finally:
        report.tell()
        report.write()
    return int(any(row.is_bad for row in report.rows))


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _introduce(context: Context) -> None:
    wide = context.bandwidth
    print(f"{context.origin.device}, commit {context.origin.commit}, torch {context.origin.torch}, ", end="")
    print(f"triton {context.triton}; reads {wide.read / 1e12:.2f} TB/s ({wide.read_by}), ", end="")
    print(f"copies {wide.copy / 1e12:.2f} TB/s", flush=True)
    if context.leave_out:
        print(f"left out here: {', '.join(sorted(context.leave_out))}")


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
        # The interpreter compiles nothing; the others' start would take most of a short run.
        is_short = arguments.cpu_logic or arguments.quick
        arguments.compilers = 0 if is_short else max(0, min(12, (os.cpu_count() or 1) - 2))
    if arguments.parts is None:
        arguments.parts = QUICK if arguments.quick else tuple(SHARES)
    if arguments.budget_s is None:
        arguments.budget_s = 50.0 if arguments.quick else 430.0
    if arguments.cpu_logic and arguments.out and arguments.out.resolve() == RESULTS.resolve():
        parser.error("--out: an interpreter's times are no results")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
