"""The GPU benchmark's logic from end to end, on tiny shapes in triton's interpreter."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "kernels_gpu.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import kernels_gpu

    return kernels_gpu


def test_checks_times_and_writes_a_row_for_each_form(tmp_path: Path) -> None:
    out = tmp_path / "kernels.csv"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--cpu-logic", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["form"] for row in rows] == ["manylora", "per-adapter products"] * 2
    assert all(float(row["median_us"]) > 0 for row in rows)
    assert all(float(row["error"]) < 1e-4 for row in rows)


def test_points_cover_the_goals_and_have_a_row_for_every_adapter(bench: Any) -> None:
    few, every = (list(bench.points(which)) for which in ("few", "all"))
    assert {(32, 32), (64, 64), (8192, 1)} <= {(point.num_rows, point.num_adapters) for point in few}
    for point in {*few, *every}:
        slots = point.slots()
        routed = slots[slots >= 0]
        assert len(slots) == point.num_rows
        assert len(np.unique(routed)) == min(point.num_adapters, len(routed))
        pages = [page for mine in point.pages() for page in mine]
        assert sorted(pages) == list(range(len(pages)))
