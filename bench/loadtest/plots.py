"""Rows as plots: throughput by number of adapters, latency and throughput by load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.loadtest.row import Row

# No window is needed, and none may be there.
mpl.use("Agg")

from matplotlib import pyplot as plt  # after the choice of where it draws
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

_MARKERS = "osD^vPX"
_LATENCIES = (
    ("ttft_ms", "first token", 1.0, "ms"),
    ("itl_ms", "between tokens", 1.0, "ms"),
    ("e2e_ms", "whole answer", 1000.0, "s"),
)


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draw what the rows of one run can show.

    Returns:
        The files made; none where the run has neither several numbers of adapters nor several loads.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    loads = {(row.rate_per_s, row.clients) for row in rows}
    if len({row.adapters for row in rows}) > 2 and len(loads) == 1:
        made.append(_save(_throughput_by_adapters(rows), directory / "throughput_by_adapters.png"))
    if len(loads) > 1:
        made.append(_save(_latency_by_load(rows), directory / "latency_by_load.png"))
        made.append(_save(_throughput_by_load(rows), directory / "throughput_by_load.png"))
    return made


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _throughput_by_adapters(rows: Sequence[Row]) -> Any:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, target in enumerate(_targets(rows)):
        mine = sorted((row for row in rows if row.target == target), key=lambda row: row.adapters)
        _line(axes, [row.adapters for row in mine], mine, number, label=target)
    _counted_axis(axes, {row.adapters for row in rows}, "adapters in the mix (0: base model only)")
    axes.set_ylabel("output tokens per second")
    axes.legend(title="target", frameon=False)
    figure.suptitle(_title(rows, "Throughput by number of adapters"), fontsize=11)
    return figure


def _throughput_by_load(rows: Sequence[Row]) -> Any:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, target in enumerate(_targets(rows)):
        for label, mine in _mixes(rows, target):
            style = "-" if mine[0].adapters else "--"
            _line(axes, [_load(row) for row in mine], mine, number, label=f"{target}, {label}", style=style)
    _load_axis(axes, rows)
    axes.set_ylabel("output tokens per second")
    axes.legend(frameon=False)
    figure.suptitle(_title(rows, "Throughput by load"), fontsize=11)
    return figure


def _line(
    axes: Any, x: Sequence[float], rows: Sequence[Row], number: int, *, label: str, style: str = "-"
) -> None:
    """Median as a line, the least and the most of the rounds as a band."""
    color = f"C{number}"
    axes.plot(x, [row.tok_s for row in rows], style, color=color, marker=_MARKERS[number], label=label)
    axes.fill_between(
        x, [row.tok_s_min for row in rows], [row.tok_s_max for row in rows], color=color, alpha=0.15, lw=0
    )


def _latency_by_load(rows: Sequence[Row]) -> Any:
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), sharex=True, layout="constrained")
    for column, (field, name, divisor, unit) in enumerate(_LATENCIES):
        for panel, percentile in zip(panels[:, column], (50, 99), strict=True):
            for number, target in enumerate(_targets(rows)):
                for label, mine in _mixes(rows, target):
                    style = "-" if mine[0].adapters else "--"
                    _latency_line(
                        panel,
                        mine,
                        f"{field}_p{percentile}",
                        divisor,
                        style,
                        color=f"C{number}",
                        marker=_MARKERS[number],
                        label=f"{target}, {label}",
                    )
            panel.set_title(f"{name}, p{percentile}", fontsize=10)
            panel.set_ylabel(unit)
            panel.set_ylim(bottom=0)
            _load_axis(panel, rows)
            if percentile == 50:
                panel.set_xlabel("")
    # The last column has every target: those that do not stream have no times of single tokens.
    handles, labels = panels[0, 2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(rows, "Latency by load"), fontsize=11)
    return figure


def _latency_line(
    panel: Any, rows: Sequence[Row], field: str, divisor: float, style: str, **look: str
) -> None:
    points = [(_load(row), getattr(row, field)) for row in rows if getattr(row, field) is not None]
    if points:
        panel.plot([x for x, _ in points], [y / divisor for _, y in points], style, **look)


def _targets(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.target for row in rows))


def _mixes(rows: Sequence[Row], target: str) -> list[tuple[str, list[Row]]]:
    """A target's rows by number of adapters, each by rising load."""
    mine = [row for row in rows if row.target == target]
    found: dict[str, list[Row]] = {}
    for row in sorted(mine, key=lambda row: (row.adapters, _load(row))):
        found.setdefault(row.mix_label, []).append(row)
    return list(found.items())


def _load(row: Row) -> float:
    return row.rate_per_s or row.clients


def _load_axis(axes: Any, rows: Sequence[Row]) -> None:
    is_rate = any(row.rate_per_s for row in rows)
    _counted_axis(
        axes, {_load(row) for row in rows}, "requests per second" if is_rate else "clients that each wait"
    )


def _counted_axis(axes: Any, values: set[float] | set[int], name: str) -> None:
    """An axis of doubling steps, with a mark at each value that was measured."""
    # Linear up to the smallest value, so that 0 has a place.
    axes.set_xscale("symlog", base=2, linthresh=min((value for value in values if value), default=1))
    axes.xaxis.set_major_locator(FixedLocator(sorted(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _title(rows: Sequence[Row], what: str) -> str:
    row = rows[0]
    shape = f"{row.requests} requests, {row.prompt} prompt and {row.output} output tokens, rank {row.rank}"
    if len({(r.rate_per_s, r.clients) for r in rows}) == 1:
        shape += f", {row.load_label}"
    return f"{what}: {row.model} ({row.dtype}) on {row.device}\n{shape}, {row.skew} skew"
