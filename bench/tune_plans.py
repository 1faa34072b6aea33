"""Search the plans of a GPU and write them into the file that ships with the kernels.

    python bench/tune_plans.py                       Llama-3-8B's sites, on the GPU at hand, in nine minutes
    python bench/tune_plans.py --pages 2 --rows 32   some of them
    python bench/tune_plans.py --cpu-logic --out plans.json     the logic, tiny, in triton's interpreter

For each site, number of rows and number of pages the search goes downhill from the formula's plan through
neighbouring tiles, warps, stages and splits. Every plan is compared with float64 before it is timed. What the
time does not suffice for keeps the plan it has; a second run goes on where the first has ended.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.gpu.budget import Deadline
from bench.gpu.commands import Platform, add_compilers, can_run, gpu_parser, num_compilers
from bench.loadtest import environment

if TYPE_CHECKING:
    from manylora_kernels.lora.plan import Plan

    from bench.gpu.tune_bench import Compilers
    from bench.gpu.tune_space import Cell

ROWS = (32, 64, 8192, 8, 128, 2048, 512)
"""Most rows of a step for each plan; the goals' first."""
PAGES = (1, 4, 2)
"""Most pages of an adapter: ranks to 16, 64 and 32."""
_SHARE = 3.0
"""A cell may take so many times its equal share of the time that is left."""
ONE_ADAPTER_ROWS = (512, 1024, 2048, 4096, 8192)


class Tuner:
    """What a search needs: the device, its facts and the time."""

    def __init__(self, platform: Platform, deadline: Deadline) -> None:
        from manylora_kernels.device import facts

        self.layer, self.dtype, self.device = platform.layer, platform.dtype, platform.device
        self.deadline = deadline
        self.facts = facts(self.device)
        self.repeats = 1 if platform.is_tiny else 9

    def cells(self, rows: Sequence[int], pages: Sequence[int]) -> list[Cell]:
        """Those of the goals first."""
        from bench.gpu.tune_space import Cell

        return [
            Cell(name, site, num_rows, num_pages, self.dtype.itemsize)
            for num_pages in pages
            for num_rows in rows
            for name, site in self.layer.items()
        ]

    def blocks(
        self, rows: Sequence[int], num_pages: int, compilers: Compilers
    ) -> tuple[tuple[int, int], ...]:
        """Choose the rows of blocks, by the formula's plans of a whole layer."""
        from manylora_kernels.lora import planner

        from bench.gpu.tune_bench import CellBench
        from bench.gpu.tune_search import rows_of_blocks
        from bench.gpu.tune_space import block_choices

        costs: dict[int, dict[int, float]] = {}
        for num_rows in rows:
            if self.deadline.is_over:
                break
            present = planner.block_rows(num_rows, self.facts)
            costs[num_rows] = dict.fromkeys(block_choices(present), 0.0)
            for cell in self.cells([num_rows], [num_pages]):
                bench = CellBench(cell, self.device, self.dtype, self.repeats)
                plans = [cell.start(block, self.facts) for block in costs[num_rows]]
                compilers.prepare(cell, plans)
                for one in plans:
                    costs[num_rows][one.block_rows] += bench.cost(one)
            print(f"{num_rows} rows, microseconds a layer by rows of a block: {costs[num_rows]}", flush=True)
        return rows_of_blocks(costs)

    def search(self, cell: Cell, start: Plan, compilers: Compilers, deadline: Deadline) -> Plan | None:
        """The best plan of a cell that the time suffices for; None where none can be built."""
        from bench.gpu.tune_bench import CellBench
        from bench.gpu.tune_search import descend
        from bench.gpu.tune_space import neighbours

        bench = CellBench(cell, self.device, self.dtype, self.repeats)
        first = bench.cost(start)
        best, cost = descend(
            start,
            partial(neighbours, cell=cell, device=self.facts),
            lambda plan: first if plan == start else bench.cost(plan),
            deadline,
            partial(compilers.prepare, cell),
        )
        what = f"{cell.name}, {cell.max_rows} rows, {cell.max_pages} pages"
        print(f"{what}: {first:.2f} -> {cost:.2f} us, {best}", flush=True)
        return best if math.isfinite(cost) else None


def tune(
    tuner: Tuner, rows: Sequence[int], pages: Sequence[int], path: Path, device: str, compilers: Compilers
) -> int:
    """Search cell by cell; the file is written after each, so that nothing found is lost.

    Returns: how many cells were searched.
    """
    from manylora_kernels.lora.plan import PREFILL_BLOCK_ROWS

    from bench.gpu import tune_file

    table = tune_file.known(path)
    limits = table.rows_of_blocks
    if not table.plans:
        # With other blocks all measured plans would be worth nothing.
        limits = tuner.blocks(rows, pages[0], compilers) or limits
    have = {(key, limit): plan for key, limit, plan in table.plans}
    cells = sorted(tuner.cells(rows, pages), key=lambda cell: (cell.key, cell.max_rows) in have)
    found: dict[Cell, Plan] = {}
    searched = 0
    measured = _measured(tuner)
    for cell in cells:
        if tuner.deadline.is_over:
            print(f"time is up; {len(cells) - searched} of {len(cells)} cells were not searched")
            break
        block = next((size for most, size in limits if cell.max_rows <= most), PREFILL_BLOCK_ROWS)
        start = have.get((cell.key, cell.max_rows)) or cell.start(block, tuner.facts)
        # A cell that is slow to search must leave time for the others.
        own = min(tuner.deadline.left_s, _SHARE * tuner.deadline.left_s / (len(cells) - searched))
        best = tuner.search(cell, start, compilers, Deadline.after(own))
        searched += 1
        if best is None:
            continue
        found[cell] = best
        entries = tune_file.merged(table, found)
        tune_file.write(path, device, measured, entries, limits, table.one_adapter_rows)
    return searched


def _measured(tuner: Tuner) -> Mapping[str, str]:
    return {
        "device": tuner.facts.name,
        "triton": environment.package_version("triton"),
        "torch": torch.__version__,
        "commit": environment.commit(),
        "date": datetime.date.today().isoformat(),
    }


def tune_one_adapter(tuner: Tuner, path: Path, device: str, rows: Sequence[int]) -> None:
    """From which number of rows on one adapter alone goes to the vendor's products."""
    from bench.gpu import tune_file
    from bench.gpu.tune_bench import products_against_kernels
    from bench.gpu.tune_search import one_adapter_rows

    times = {
        num_rows: products_against_kernels(tuner.layer, num_rows, tuner.device, tuner.dtype, tuner.repeats)
        for num_rows in rows
    }
    print(f"one adapter, microseconds of kernels and products by rows: {times}", flush=True)
    table = tune_file.known(path)
    entries = tune_file.merged(table, {})
    limits, least = table.rows_of_blocks, one_adapter_rows(times)
    tune_file.write(path, device, _measured(tuner), entries, limits, least)


def main(argv: Sequence[str] | None = None) -> int:
    """Search and write.

    Returns: the exit status.
    """
    arguments = _parse(argv)
    if not can_run(arguments, "tune"):
        return 0
    from bench.gpu import tune_file
    from bench.gpu.tune_bench import Compilers

    tuner = Tuner(Platform.of(arguments), Deadline.after(arguments.budget_s))
    device, path = tune_file.path_of(tuner.facts.name)
    path = arguments.out or path
    compilers = Compilers(num_compilers(arguments), tuner.dtype, tuner.device)
    try:
        searched = tune(tuner, arguments.rows, arguments.pages, path, device, compilers)
    finally:
        compilers.close()
    if arguments.one_adapter:
        tune_one_adapter(tuner, path, device, (6,) if arguments.cpu_logic else ONE_ADAPTER_ROWS)
    print(f"{searched} cells searched; {path}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = gpu_parser(__doc__, budget_s=530.0, budget="seconds of the search")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="most rows of a step")
    parser.add_argument("--pages", type=int, nargs="+", default=list(PAGES), help="most pages of an adapter")
    add_compilers(parser)
    parser.add_argument("--one-adapter", action="store_true", help="also where the vendor's products begin")
    parser.add_argument("--out", type=Path, metavar="FILE", help="in place of the shipped file")
    arguments = parser.parse_args(argv)
    if arguments.cpu_logic and arguments.out is None:
        parser.error("--cpu-logic needs --out: what an interpreter measures is not shipped")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
