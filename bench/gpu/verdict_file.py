"""bench/results/gpu_goals.csv: the verdicts of a run, written anew while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.loadtest.csv_file import append_csv, read_csv
from bench.loadtest.origin import Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Origin):
    """A row of the file."""

    goal: str
    wanted: str
    floor: str
    found: str
    verdict: str


COLUMNS = ("goal", "wanted", "floor", "found", "verdict")


def write(path: Path, origin: Origin, judged: Sequence[Sequence[str]]) -> None:
    """Put a run's verdicts in the place of those that it wrote before; other runs' stay.

    Args:
        judged: of each goal the columns.

    Raises:
        ValueError: the file has other columns.
    """
    kept = [row for row in read_csv(path, Verdict) if row.run != origin.run] if path.exists() else []
    kept += [Verdict(**asdict(origin), **dict(zip(COLUMNS, row, strict=True))) for row in judged]
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    append_csv(draft, kept)
    draft.replace(path)
