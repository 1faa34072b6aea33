"""Rows as tables: plain text of at most 100 columns for people, Markdown for RESULTS.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.loadtest.row import COUNTERS, PERCENTILES, Row

_WORDS = {"target", "mix", "load", "ratio", "part", "fault", "outcomes", "ends", "memory", "verdict", "step"}
_WORDS |= {"dtype", "model", "protocol", "column", "value", "form", "goal", "wanted", "found"}
"""Columns that are aligned on the left."""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells under a header."""

    header: list[str]
    lines: list[list[str]]

    def without(self, *names: str) -> Table:
        """Leave columns out that say the same in every line."""
        left_out = {
            index
            for index, name in enumerate(self.header)
            if name in names and len({line[index] for line in self.lines}) <= 1
        }

        def keep(cells: list[str]) -> list[str]:
            return [cell for index, cell in enumerate(cells) if index not in left_out]

        return Table(keep(self.header), [keep(line) for line in self.lines])

    def plain(self) -> str:
        """Align: words left, numbers right."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.lines, strict=True)]

        def put(cells: list[str]) -> str:
            aligned = [
                cell.ljust(width) if name in _WORDS else cell.rjust(width)
                for name, cell, width in zip(self.header, cells, widths, strict=True)
            ]
            return "  ".join(aligned).rstrip()

        return "\n".join(map(put, [self.header, *self.lines]))

    def markdown(self) -> str:
        rule = ["---" if name in _WORDS else "---:" for name in self.header]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [self.header, rule, *self.lines])


def throughput(rows: Sequence[Row]) -> Table:
    """Requests and tokens a second: the median of the rounds; of tokens the worst and the best, too."""
    header = ["target", "mix", "load", "req/s", "tok/s", "least", "most", "errors"]
    lines = [
        [row.target, row.mix_label, row.load_label, f"{row.req_s:.2f}"]
        + [f"{rate:.1f}" for rate in (row.tok_s, row.tok_s_min, row.tok_s_max)]
        + [f"{row.errors}: {row.error_codes}" if row.errors else "0"]
        for row in rows
    ]
    return Table(header, lines).without("load")


def latency(rows: Sequence[Row]) -> Table:
    """Percentiles: first token and between tokens in milliseconds, the whole answer in seconds.

    Where loads differ, their column takes the place of the 90th percentiles.
    """
    shown = (50, 99) if len({row.load_label for row in rows}) > 1 else PERCENTILES
    header = ["target", "mix", "load"]
    for name in ("first", "next", "whole"):
        header += [f"{name} p{shown[0]}", *(f"p{percentile}" for percentile in shown[1:])]
    lines = []
    for row in rows:
        line = [row.target, row.mix_label, row.load_label]
        for name, divisor, form in (("ttft", 1, ".0f"), ("itl", 1, ".1f"), ("e2e", 1000, ".2f")):
            for percentile in shown:
                value = getattr(row, f"{name}_ms_p{percentile}")
                line.append(_number(None if value is None else value / divisor, form))
        lines.append(line)
    return Table(header, lines).without("load")


def ratios(rows: Sequence[Row]) -> Table:
    """Ratios of tokens a second, adapters to base and target to first target: median, least and most."""
    lines = []
    for row in rows:
        if row.vs_base is not None:
            name = f"{row.target}: {row.mix_label} / base"
            lines.append([name, row.load_label, *_spread(row.vs_base, row.vs_base_min, row.vs_base_max)])
    for row in rows:
        if row.vs_first is not None:
            name = f"{row.target} / {rows[0].target}: {row.mix_label}"
            lines.append([name, row.load_label, *_spread(row.vs_first, row.vs_first_min, row.vs_first_max)])
    return Table(["ratio", "load", "median", "least", "most"], lines).without("load")


def counters(rows: Sequence[Row]) -> Table:
    """What the engine counted over all rounds, where it could be asked."""
    lines = [
        [row.target, row.mix_label, row.load_label, *(str(getattr(row, name)) for name in COUNTERS)]
        for row in rows
        if row.steps is not None
    ]
    # Of tokens found in the prefix cache: its whole name would make the table too wide.
    names = ["hit tokens" if name == "prefix_hit_tokens" else name.replace("_", " ") for name in COUNTERS]
    header = ["target", "mix", "load", *names]
    return Table(header, lines).without("load")


def _spread(*values: float | None) -> list[str]:
    return [_number(value, ".3f") for value in values]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
