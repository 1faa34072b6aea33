"""The rows of a run of `gpu_suite.py`, and what is written of them while it goes on."""

from __future__ import annotations

from pathlib import Path

from bench.gpu import verdict_file
from bench.gpu.attempt import attempt
from bench.gpu.goals import judge
from bench.gpu.rows import Context, Row
from bench.gpu.suite_parts import whole_run
from bench.loadtest.csv_file import append_csv
from bench.loadtest.table import Table

INTERPRETER = "interpreter"
ROWS = "gpu_suite.csv"


class Report:
    """The rows of a run so far, and what is written and printed of them.

    Args:
        out: the folder of the files; None: nothing is written.
        writes_goals: False: a run's goals are judged by whoever has all of its rows.
    """

    def __init__(self, context: Context, out: Path | None, writes_goals: bool = True) -> None:
        self.context, self.out, self._writes_goals = context, out, writes_goals
        self.rows: list[Row] = []

    def keep(self, row: Row) -> None:
        """One more."""
        self.rows.append(row)
        if self.out is not None:
            append_csv(self.out / ROWS, [row])

    def judged(self) -> list[tuple[str, str, str, str, str]]:
        """The goals by the rows so far."""
        return judge(self.rows, whole_run(self.context), timed=not self.context.is_tiny)

    def write(self) -> None:
        """The goals' file and the plot, in place of those that this run has written before."""
        if self.out is None or not self.rows or not self._writes_goals:
            return
        origin, out = self.context.origin, self.out
        verdict_file.write(out / "gpu_goals.csv", origin, self.judged())

        def draw() -> None:
            from bench.gpu import plot  # matplotlib may be missing

            path = out / f"gpu_kernels_{origin.label or INTERPRETER}.png"
            plot.draw(self.rows, path, f"Adapters' part of a layer, {origin.device}")

        if isinstance(why := attempt(draw), str):
            print(f"# no plot: {why}", flush=True)

    def print_goals(self) -> None:
        """Print the goals."""
        if not self._writes_goals:
            return
        header = ["goal", "wanted", "floor", "found", "verdict"]
        print(Table(header, [list(found) for found in self.judged()]).plain(), flush=True)
