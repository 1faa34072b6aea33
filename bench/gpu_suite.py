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
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu import lease_files
from bench.gpu.commands import (
    Platform,
    add_compilers,
    add_peers,
    can_run,
    gpu_parser,
    num_compilers,
)
from bench.gpu.peer_modules import FOLDER
from bench.gpu.suite_parts import QUICK, SHARES, compile_all
from bench.gpu.suite_run import make_context, run
from bench.paths import RESULTS

if TYPE_CHECKING:
    from bench.gpu.rows import Context

_COMPILE_SHARE = 0.3
"""Of the time, at most, for compiling beforehand."""
_LEASE_S = 570.0
"""Of all stages: a command on a lent machine has 600 s, and the last process has to end before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the goals, and save.

    Returns: the exit status.
    """
    arguments = _parse(argv)
    if arguments.fetch_lease:
        return lease_files.fetch(lease_files.LEASE)
    if not can_run(arguments, "measure"):
        return 0
    if arguments.lease:
        from bench.gpu import lease

        name = "interpreter" if arguments.cpu_logic else lease.device_name() or "unknown"
        context = make_context(Platform.of(arguments), arguments.peers, device_name=name)
        return lease.run(arguments, context, arguments.out or RESULTS)
    return _run_here(arguments)


def _run_here(arguments: argparse.Namespace) -> int:
    """All parts in this process."""
    from bench.gpu.suite_report import Report

    context = make_context(
        Platform.of(arguments), arguments.peers, is_quick=arguments.quick, origin=arguments.origin
    )
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
        report.print_goals()
        report.write()
    return int(any(row.is_bad for row in report.rows))


def _introduce(context: Context) -> None:
    wide = context.bandwidth
    print(f"{context.origin.device}, commit {context.origin.commit}, torch {context.origin.torch}, ", end="")
    print(f"triton {context.triton}; reads {wide.read / 1e12:.2f} TB/s ({wide.read_by}), ", end="")
    print(f"copies {wide.copy / 1e12:.2f} TB/s", flush=True)
    if context.leave_out:
        print(f"left out here: {', '.join(sorted(context.leave_out))}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_parser(
        __doc__, budget_s=None, budget="seconds, then nothing more is begun; 430, quick 50, lease 570"
    )
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, in about a minute")
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), help="these parts only")
    add_peers(parser, default=None)
    parser.add_argument("--save", action="store_true", help="rows, goals and plot into bench/results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="into this folder instead")
    parser.add_argument(
        "--lease", action="store_true", help="each part in a process that is killed at its limit"
    )
    parser.add_argument(
        "--fetch-lease", action="store_true", help="fetch what --lease needs, into .cache/lease"
    )
    add_compilers(parser)
    # Of the processes of a lease: when they are to end, what their rows share, and to compile only.
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--origin", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.compilers = num_compilers(arguments, is_short=arguments.quick)
    if arguments.parts is None:
        arguments.parts = QUICK if arguments.quick else tuple(SHARES)
    if arguments.budget_s is None:
        arguments.budget_s = _LEASE_S if arguments.lease else 50.0 if arguments.quick else 430.0
    if arguments.peers is None:
        arguments.peers = lease_files.peers_folder() if arguments.lease else FOLDER
    if arguments.cpu_logic and arguments.lease and not arguments.out:
        parser.error("--lease --cpu-logic: needs --out")
    if arguments.cpu_logic and arguments.out and arguments.out.resolve() == RESULTS.resolve():
        parser.error("--out: an interpreter's times are no results")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
