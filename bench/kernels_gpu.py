"""Measure `add_lora` and its peers at more points than `gpu_suite.py` has time for.

    python bench/kernels_gpu.py [--points few|all] [--budget-s 240] [--out kernels_gpu.csv]
    python bench/kernels_gpu.py --cpu-logic          the same on tiny shapes in triton's interpreter

The shapes are Llama-3-8B's: a layer of four sites. Every form at every point is first checked against
float64, then all take turns.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench import gpu_suite
from bench.gpu.budget import Deadline
from bench.gpu.peer_modules import FOLDER
from bench.gpu.shapes import LLAMA_LAYER, TINY_LAYER, TINY_POINTS, all_points, few_points

__all__ = ["LAYER", "TINY_LAYER", "main", "write_rows"]

LAYER = LLAMA_LAYER


def write_rows(rows: Sequence[Mapping[str, object]], path: Path, where: Mapping[str, object]) -> None:
    """Append to a CSV, each row with where and with what it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*where, *rows[0]])
        if is_new:
            writer.writeheader()
        writer.writerows({**where, **row} for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write.

    Returns: the exit status, 1 where a form was wrong or failed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu-logic", action="store_true", help="tiny shapes in triton's interpreter")
    parser.add_argument("--points", choices=["few", "all"], default="few")
    parser.add_argument("--budget-s", type=float, default=240.0, help="seconds, then no new point is begun")
    parser.add_argument("--peers", type=Path, default=FOLDER, help="where bench/peers.py has put its files")
    parser.add_argument("--out", type=Path, help="a CSV to append to")
    arguments = parser.parse_args(argv)
    if arguments.cpu_logic:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--cpu-logic runs the logic on a CPU)")
        return 0
    from bench.gpu import part_kernels  # imports what imports triton

    arguments.quick, arguments.origin = False, {}
    context = gpu_suite.make_context(arguments)
    chosen = {"few": few_points, "all": all_points}[arguments.points]()
    rows = []
    deadline = Deadline.after(arguments.budget_s)
    for row in part_kernels.run(context, deadline, TINY_POINTS if context.is_tiny else chosen):
        print(gpu_suite.line_of(row), flush=True)
        rows.append(row)
    if arguments.out and rows:
        write_rows([asdict(row) for row in rows], arguments.out, {})
    return int(any(row.is_bad for row in rows))


if __name__ == "__main__":
    sys.exit(main())
