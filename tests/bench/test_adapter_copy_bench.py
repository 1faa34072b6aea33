"""The benchmark's logic from end to end on a CPU: what it checks, and its rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from bench import adapter_copy
from bench.gpu.shapes import LLAMA_LAYER, TINY_LAYER

from .programs import BENCH, run_python

CPU = torch.device("cpu")


def test_checks_times_and_writes_a_row_for_each_rank_and_arrangement(tmp_path: Path) -> None:
    out = tmp_path / "copies.csv"
    done = run_python(BENCH / "adapter_copy.py", "--cpu-logic", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["runs"]) for row in rows] == [
        ("8", "1"),
        ("16", "1"),
        ("64", "1"),
        ("64", "4"),
    ]
    assert all(0 < float(row["least_us"]) <= float(row["median_us"]) <= float(row["most_us"]) for row in rows)
    assert all(float(row["queued_us"]) > 0 for row in rows)


def test_an_adapter_of_llama_has_the_bytes_of_the_design() -> None:
    """16 rows x 32 layers x sum over the linears of (inputs + outputs) x 2 bytes."""
    spec = adapter_copy.spec_of(LLAMA_LAYER, 32)
    linears = [
        *[(4096, n) for n in (4096, 1024, 1024, 4096, 14336, 14336)],
        (14336, 4096),
    ]
    assert sum(kind.page_elements() for kind in spec.kinds) * 2 == 16 * 32 * 2 * sum(map(sum, linears))


def test_a_copy_that_is_not_whole_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = adapter_copy.spec_of(TINY_LAYER, 2)
    pool = adapter_copy.make_pool(spec, 32, torch.float32, CPU, scattered=False)
    weights = adapter_copy.make_weights(spec, 32, torch.float32, CPU)
    adapter_copy.check(pool, weights)

    def forgets_a_row(pool: object, weights: object) -> object:
        placement = place(pool, weights)
        pool.tensors.kinds[0]["a"][1, placement.pages[0][1], 0, 15] = 0.0  # type: ignore[attr-defined]
        return placement

    place = adapter_copy.place
    monkeypatch.setattr(adapter_copy, "place", forgets_a_row)
    with pytest.raises(AssertionError, match="not arrived whole"):
        adapter_copy.check(pool, weights)
