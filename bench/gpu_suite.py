"""Prove and measure everything on a GPU, in one run of at most 8 minutes.

    python bench/peers.py                            once, where there is a network
    python bench/gpu_suite.py --save                 all parts; rows, goals and a plot go to bench/results
    python bench/gpu_suite.py --quick                our kernels at the goals' steps, in about a minute
    python bench/gpu_suite.py --cpu-logic            the same logic on tiny shapes in triton's interpreter
    python bench/gpu_suite.py --fetch-lease          once, where there is a network, for a GPU that is lent:
    python bench/gpu_suite.py --lease --out DIR      all parts, and the tests, each in its own process

Every form is compared with float64 before it is timed. Forms take turns, each in a CUDA graph over more
layers of different weights than the caches hold; times are medians with the least and the most. Parts run in
the order of the goals, ours before the peers', and goals and plot are written after each: a run that is cut
short has what it has found. The status is 1 where a form or a proof failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from bench.gpu.budget import Budget
from bench.gpu.lease_files import peers_folder
from bench.gpu.peer_modules import FOLDER
from bench.gpu.suite_parts import QUICK, RESERVED_S, SHARES, compile_all, parts
from bench.loadtest import environment
from bench.loadtest.origin import Origin
from bench.paths import RESULTS

if TYPE_CHECKING:
    from bench.gpu.rows import Context, Row

_COMPILE_SHARE = 0.3
"""Of the time, at most, for compiling beforehand."""
_LEASE_S = 570.0
"""Of all stages: a command on a lent machine has 600 s, and the last process has to end before."""
_SLOW_IN_INTERPRETER = frozenset({"vllm", "vllm, batch invariant"})
"""Thousands of programs that do nothing: half a minute for a tiny step."""


def make_context(arguments: argparse.Namespace, device_name: str = "") -> Context:
    """Look at the device and measure its bandwidth.

    Args:
        device_name: then the device is not touched, and no bandwidth known.
    """
    from bench.gpu.clock import measured_bandwidth
    from bench.gpu.floors import Bandwidth
    from bench.gpu.rows import Context, label_of
    from bench.gpu.shapes import LLAMA_LAYER, TINY_LAYER

    tiny = bool(arguments.cpu_logic)
    device = torch.device("cpu" if tiny else "cuda")
    name = device_name or ("interpreter" if tiny else environment.device_name())
    return Context(
        origin=replace(Origin.now("" if tiny else label_of(name), device=name), **arguments.origin),
        triton=environment.package_version("triton"),
        device=device,
        # The interpreter computes bfloat16 wrongly.
        dtype=torch.float16 if tiny else torch.bfloat16,
        layer=TINY_LAYER if tiny else LLAMA_LAYER,
        bandwidth=Bandwidth(0.0, 0.0) if device_name else measured_bandwidth(device),
        peers=arguments.peers,
        repeats=1 if tiny else 7 if arguments.quick else 15,
        proofs=3 if tiny else 1000,
        is_tiny=tiny,
        leave_out=_SLOW_IN_INTERPRETER if tiny else frozenset(),
    )


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
    from bench.gpu.attempt import guarded

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
    from bench.gpu.attempt import attempt
    from bench.gpu.clock import measured_bandwidth

    def settle() -> None:
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        context.bandwidth = context.bandwidth.or_larger(measured_bandwidth(context.device))

    if isinstance(why := attempt(settle), str):
        print(f"# {why}", flush=True)


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
    if arguments.fetch_lease:
        from bench.gpu import lease_files

        return lease_files.fetch(lease_files.LEASE)
    if arguments.cpu_logic:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--cpu-logic runs the logic on a CPU)")
        return 0
    # Whoever ends the run by a signal gets what it has found.
    signal.signal(signal.SIGTERM, _end)
    if arguments.lease:
        from bench.gpu import lease

        name = "interpreter" if arguments.cpu_logic else lease.device_name() or "unknown"
        return lease.run(arguments, make_context(arguments, name), arguments.out or RESULTS)
    return _run_here(arguments)


def _run_here(arguments: argparse.Namespace) -> int:
    """All parts in this process."""
    from bench.gpu.suite_report import Report

    context = make_context(arguments)
    _introduce(context)
    out: Path | None = arguments.out or (RESULTS if arguments.save and not context.is_tiny else None)
    report = Report(context, out, writes_goals=not arguments.origin)
    budget_s = arguments.until - time.time() if arguments.until else arguments.budget_s
    begin = time.monotonic()
    try:
        if arguments.compilers:
            share = 1.0 if arguments.compile_only else _COMPILE_SHARE
            compile_all(context, arguments.parts, arguments.compilers, share * budget_s)
        if not arguments.compile_only:
            left_s = budget_s - (time.monotonic() - begin)
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
    parser.add_argument(
        "--budget-s", type=float, help="seconds, then nothing more is begun; 430, quick 50, lease 570"
    )
    parser.add_argument("--peers", type=Path, help="where bench/peers.py has put its files")
    parser.add_argument("--save", action="store_true", help="rows, goals and plot into bench/results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="into this folder instead")
    parser.add_argument(
        "--lease", action="store_true", help="each part in a process that is killed at its limit"
    )
    parser.add_argument(
        "--fetch-lease", action="store_true", help="fetch what --lease needs, into .cache/lease"
    )
    # Of the processes of a lease: when they are to end, what their rows share, and to compile only.
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--origin", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
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
        arguments.budget_s = _LEASE_S if arguments.lease else 50.0 if arguments.quick else 430.0
    if arguments.peers is None:
        arguments.peers = peers_folder() if arguments.lease else FOLDER
    if arguments.cpu_logic and arguments.lease and not arguments.out:
        parser.error("--lease --cpu-logic: needs --out")
    if arguments.cpu_logic and arguments.out and arguments.out.resolve() == RESULTS.resolve():
        parser.error("--out: an interpreter's times are no results")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
