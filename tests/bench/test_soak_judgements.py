"""What a soak asks, and what its judgements find on numbers made for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.campaigns.harness import Wanted
from bench.campaigns.soak.memory import MIB, Sample, save_csv, save_plot, trends
from bench.campaigns.soak.plan import Plan

NAMES = [f"soak-{number}" for number in range(4)]


def test_an_operation_depends_on_its_seed_and_number_alone():
    def operations(seed: int) -> list[object]:
        return [Plan(seed, NAMES, 2).operation(index) for index in range(200)]

    assert operations(3) == operations(3)
    assert operations(3) != operations(4)


def samples(*rss_mib: float) -> list[Sample]:
    """Looks at one process, 1,000 operations apart."""
    return [Sample(1000 * i, i, "engine", 1, int(mib * MIB), 0) for i, mib in enumerate(rss_mib)]


@pytest.mark.parametrize(
    ("rss_mib", "slope_mib", "is_flat"),
    [
        ((100, 900, 1000, 1000, 1000, 1000, 1000), 0, True),
        ((100, 900, 1000, 1004, 996, 1004, 1000), 0.0, True),
        ((100, 900, 1000, 1000, 990, 980, 970), -10, True),
        ((100, 900, 1000, 1000, 1010, 1020, 1030), 10, False),
        ((10, 10, 10, 10, 12, 14, 16), 2, True),
        ((10, 10, 10, 10, 14, 18, 22), 4, False),
    ],
    ids=["flat", "to and fro", "falling", "growing", "small, within a block", "small, growing"],
)
def test_growth_over_the_last_half_is_found(rss_mib: tuple[float, ...], slope_mib: float, is_flat: bool):
    (trend,) = trends(samples(*rss_mib))
    assert trend.slope_bytes / MIB == pytest.approx(slope_mib, abs=1)
    assert trend.is_flat == is_flat


def test_memory_over_time_is_saved_as_a_table_and_a_picture(tmp_path: Path):
    save_csv(samples(1, 2, 3), tmp_path / "new" / "memory.csv")
    lines = (tmp_path / "new" / "memory.csv").read_text().splitlines()
    assert lines[0] == "num_done,seconds,process,pid,rss_bytes,pss_bytes"
    assert lines[3] == f"2000,2,engine,1,{3 * MIB},0"
    save_plot(samples(1, 2, 3), tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_an_answer_unlike_pefts_is_found():
    wanted = Wanted([1, 2, 3], [1.0, 1.0, 1e-6])
    assert not wanted.start(2).is_tie([1, 2])
    assert wanted.is_tie([1, 2, 4])
    with pytest.raises(AssertionError):
        wanted.is_tie([1, 4, 3])
