"""Our kernels and the peers against the floors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from bench.gpu import forms
from bench.gpu.rows import Row

# No window is needed, and none may be there.
mpl.use("Agg")

from matplotlib import pyplot as plt  # after the choice of where it draws

_MARKERS = "osD^vPX<>"


def draw(rows: Sequence[Row], path: Path, title: str) -> Path | None:
    """Draw microseconds a layer of each form at each step, and the floor below them.

    Returns:
        The file; None where no step was timed.
    """
    mine = [row for row in rows if row.part == "kernels" and row.median_us]
    steps = sorted({step(row) for row in mine}, key=lambda found: found[0])
    if not steps:
        return None
    names = list(dict.fromkeys(row.form for row in mine))
    places = {name: place for place, (_, name) in enumerate(steps)}
    figure, axes = plt.subplots(figsize=(max(8.0, 0.45 * len(steps)), 6), layout="constrained")
    for number, name in enumerate(names):
        own = [row for row in mine if row.form == name]
        axes.plot(
            [places[step(row)[1]] for row in own],
            [row.median_us for row in own],
            _MARKERS[number % len(_MARKERS)],
            markersize=9 if name == forms.OURS else 6,
            label=name,
        )
    floors = {step(row)[1]: row.floor_us for row in mine if row.floor_us}
    axes.plot(
        [places[name] for name in places if name in floors],
        [floors[name] for name in places if name in floors],
        "k_",
        markersize=14,
        label="floor: bytes over bandwidth",
    )
    axes.set_yscale("log")
    axes.set_ylabel("microseconds a layer")
    axes.set_xticks(range(len(steps)), list(places), rotation=60, ha="right", fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def step(row: Row) -> tuple[tuple[int, int, str, int, float], str]:
    """How steps are sorted, and what one is called."""
    key = (row.rows or 0, row.adapters or 0, row.rank, row.skewed or 0, row.base_share or 0.0)
    name = f"{row.rows} rows, {row.adapters} x {row.rank}"
    name += ", Zipf" if row.skewed else ""
    return key, name + (f", {100 * (row.base_share or 0):.0f}% without" if row.base_share else "")
