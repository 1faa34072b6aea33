"""The GPU suite's processes: what they do, and that none of them is waited for beyond its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.gpu import prewarm
from bench.gpu.workers import Workers

# What a process does here is to evaluate its job.
FAILS, ENDS = "1 / 0", "__import__('os')._exit(3)"
DEAF = "__import__('signal').signal(15, __import__('signal').SIG_IGN)"


def hangs(marks: Path) -> str:
    """Longer than it may, and deaf to a polite signal; leaves files where it begins and where it ends."""
    begun, ended = (f"open({str(marks / name)!r}, 'w').close()" for name in ("begun", "ended"))
    return f"({DEAF}, {begun}, __import__('time').sleep(20), {ended})"


def run(jobs: list[str], count: int, limit_s: float) -> int:
    workers = Workers(eval, count)
    try:
        return workers.run(jobs, limit_s)
    finally:
        workers.close()


@pytest.mark.parametrize(
    ("jobs", "count", "done"),
    [
        pytest.param(["1", "1", "0", "1"], 2, 3, id="what_is_not_true_is_not_done"),
        pytest.param([FAILS, "1", "1"], 2, 2, id="one_fails"),
        pytest.param([ENDS, "1", "1"], 2, 2, id="one_ends_its_process"),
        pytest.param([ENDS, ENDS, "1"], 2, 0, id="no_process_is_left"),
        pytest.param(["1"], 0, 0, id="no_process_at_all"),
        pytest.param([], 1, 0, id="no_job"),
    ],
)
def test_jobs_are_done_side_by_side_and_those_that_fail_are_not_counted(
    jobs: list[str], count: int, done: int
) -> None:
    assert run(jobs, count, 100.0) == done


def test_a_process_that_hangs_is_killed_and_the_others_jobs_count(tmp_path: Path) -> None:
    workers = Workers(eval, 2)
    try:
        assert workers.run(["1"] * 6, 100.0) == 6
        assert workers.run([hangs(tmp_path), "1", "1"], 3.0) == 2
        # The other goes on.
        assert workers.run(["1"], 100.0) == 1
    finally:
        workers.close()
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_compiling_beforehand_ends_at_its_limit_whoever_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prewarm, "launch", eval)
    monkeypatch.setattr(prewarm, "fill_model", eval)
    forms, model = tmp_path / "forms", tmp_path / "model"
    for folder in (forms, model):
        folder.mkdir()
    jobs: list[Any] = [hangs(forms)]
    of_model: Any = hangs(model)
    assert prewarm.prewarm(jobs, 1, 3.0, of_model) == 0
    assert "ended" not in {path.name for path in tmp_path.glob("*/*")}
