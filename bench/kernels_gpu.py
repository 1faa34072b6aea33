"""Measure `add_lora` and its peers at more points than `gpu_suite.py` has time for.

    python bench/kernels_gpu.py [--points few|all] [--budget-s 240] [--out kernels_gpu.csv]
    python bench/kernels_gpu.py --cpu-logic          the same on tiny shapes in triton's interpreter

The shapes are Llama-3-8B's: a layer of four sites. Every form at every point is first checked against
float64, then all take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.budget import Deadline
from bench.gpu.commands import Platform, add_peers, can_run, gpu_parser
from bench.gpu.shapes import TINY_POINTS, all_points, few_points
from bench.gpu.suite_run import line_of, make_context
from bench.loadtest.csv_file import append_csv


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write.

    Returns: the exit status, 1 where a form was wrong or failed.
    """
    parser = gpu_parser(__doc__, budget_s=240.0, budget="seconds, then no new point is begun")
    parser.add_argument("--points", choices=["few", "all"], default="few")
    add_peers(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a CSV to append to")
    arguments = parser.parse_args(argv)
    if not can_run(arguments, "measure"):
        return 0
    from bench.gpu import part_kernels  # imports what imports triton

    context = make_context(Platform.of(arguments), arguments.peers)
    chosen = {"few": few_points, "all": all_points}[arguments.points]()
    is_bad = False
    deadline = Deadline.after(arguments.budget_s)
    for row in part_kernels.run(context, deadline, TINY_POINTS if context.is_tiny else chosen):
        print(line_of(row), flush=True)
        if arguments.out:
            append_csv(arguments.out, [row])
        is_bad |= row.is_bad
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
