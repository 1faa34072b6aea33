"""bench/serving.py as a command, on a tiny model."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from bench.loadtest.csv_file import read_csv
from bench.loadtest.row import Row

from ..programs import BENCH, run_python


def serving(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(BENCH / "serving.py", *arguments, OMP_NUM_THREADS="1")


def test_engine_and_peft_are_compared_measured_and_saved(tiny_model: Callable[..., Path], tmp_path: Path):
    saved = tmp_path / "serving.csv"
    ended = serving(
        f"--base-model={tiny_model('llama')}",
        "--short",
        "--targets=engine,peft",
        "--requests=6",
        "--adapters=1,3",
        "--rank=4",
        "--prompt-tokens=3-9",
        "--output-tokens=2-6",
        "--skew=zipf:1",
        "--label=tiny",
        f"--csv={saved}",
        f"--plot={tmp_path}",
    )
    assert ended.returncode == 0, ended.stderr
    assert "engine: 18 of 18 answers the same as peft's" in ended.stdout
    assert "peft / engine: 3 adapters" in ended.stdout
    rows = read_csv(saved, Row)
    assert [(row.target, row.adapters) for row in rows] == [
        (target, count) for count in (0, 1, 3) for target in ("engine", "peft")
    ]
    assert {(row.label, row.rounds, row.errors, row.arrival) for row in rows} == {("tiny", 2, 0, "at-once")}
    assert all(row.tok_s_min <= row.tok_s <= row.tok_s_max for row in rows)
    assert all((row.steps is None) == (row.target == "peft") for row in rows)
    assert (tmp_path / "throughput_by_adapters.png").is_file()


def test_what_cannot_be_opened_ends_with_one_line(tiny_model: Callable[..., Path]):
    ended = serving(
        f"--base-model={tiny_model('llama')}", "--short", "--targets=engine", "--set=max_lorass=1"
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("serving.py: ")
    assert "Traceback" not in ended.stderr
