"""The GPU suite: its logic from end to end in triton's interpreter, and what it decides by itself."""

from __future__ import annotations

import csv
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.gpu import floors, goals, names, shapes
from bench.gpu.attempt import attempt, guarded
from bench.gpu.budget import Budget
from bench.gpu.floors import Bandwidth
from bench.gpu.forms import OURS, SGLANG_CSGMV, SGLANG_V2
from bench.gpu.rows import label_of
from bench.gpu.shapes import LLAMA_LAYER, MIXED, Point

from .programs import BENCH, environment, run_python


@pytest.mark.slow
def test_a_lease_runs_every_part_and_leaves_its_rows_its_goals_and_its_plot(tmp_path: Path) -> None:
    """All stages in order, each in a process of its own."""
    suite = [str(BENCH / "gpu_suite.py"), "--cpu-logic", "--lease", "--out", str(tmp_path)]
    done = run_python(*suite, "--peers", str(tmp_path), "--budget-s", "2000")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = [line for line in done.stdout.splitlines() if line.startswith("# stage") and "took" in line]
    assert [line.split()[2].rstrip(":") for line in stages] == [
        "goals", "tests", "model", "exposed", "proofs", "copy", "peers",
    ]  # fmt: skip
    with (tmp_path / "gpu_suite.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["device"] for row in rows} == {"interpreter"}
    # All processes' rows are of one run.
    assert len({(row["run"], row["command"]) for row in rows}) == 1
    assert {row["part"] for row in rows} == {
        "kernels alone", "kernels", "exposed", "exposed, with peers", "pool rank", "decode", "prefill",
        "copy", "proofs", "peft", "tests",
    }  # fmt: skip
    tests = {row["form"].rpartition("/")[2]: row["result"] for row in rows if row["part"] == "tests"}
    assert tests.pop("test_route.py").startswith("ok: ")
    assert set(tests.values()) == {"missing: needs a CUDA device"}
    measured = {row["form"] for row in rows if row["part"] == "kernels" and row["median_us"]}
    assert measured == {OURS, "per-adapter products"}
    # The peers were not fetched to there: they are missing by name.
    assert {SGLANG_V2, SGLANG_CSGMV} <= {row["form"] for row in rows if "not fetched" in row["result"]}
    errors = [float(row["error"]) for row in rows if row["error"]]
    assert errors
    assert max(errors) < 1e-2
    steps = [row for row in rows if row["part"] == "decode" and row["median_us"]]
    # Each step of the engine says whether it was replayed.
    assert steps
    assert all(names.REPLAYED_ALL in row["result"] for row in steps)
    with (tmp_path / "gpu_goals.csv").open() as file:
        verdicts = {row["goal"]: row["verdict"] for row in csv.DictReader(file)}
    assert len(verdicts) == len(goals.GOALS)
    # Times of an interpreter say nothing; right results and equal bits do.
    assert sorted(verdicts.values()) == ["met"] * 2 + ["not measured"] * (len(goals.GOALS) - 2)
    assert (tmp_path / "gpu_kernels_interpreter.png").stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where these tests run as they are")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on in this process")
def test_its_forms_pass_in_the_interpreter(pass_interpreted: Callable[..., str]) -> None:
    pass_interpreted(Path(__file__).parent / "test_suite_forms.py")


def test_times_of_an_interpreter_are_not_written_among_the_results() -> None:
    done = run_python(
        str(BENCH / "gpu_suite.py"), "--cpu-logic", "--out", str(BENCH / "results"), "--parts", "copy"
    )
    assert done.returncode == 2
    assert "no results" in done.stderr


def test_kernels_alone_are_checked_timed_and_written(tmp_path: Path) -> None:
    out = tmp_path / "kernels.csv"
    script = str(BENCH / "kernels_gpu.py")
    done = run_python(script, "--cpu-logic", "--out", str(out), "--peers", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open() as file:
        rows = [row for row in csv.DictReader(file) if row["median_us"]]
    assert [row["form"] for row in rows] == [OURS, "per-adapter products"] * 2
    assert all(float(row["median_us"]) > 0 for row in rows)


def test_points_cover_the_goals_and_every_adapter_has_a_row() -> None:
    few = set(shapes.few_points())
    assert set(shapes.GOAL_POINTS) <= few
    assert {1, 8, 64, 128, 256, 512, 2048, 8192} <= {point.num_rows for point in few}
    assert {1, 4, 16, 32, 64} <= {point.num_adapters for point in few}
    assert {(8,), (16,), (32,), (64,), MIXED} <= {point.ranks for point in few}
    for point in {*few, *shapes.all_points()}:
        slots = point.slots()
        routed = slots[slots >= 0]
        assert len(slots) == point.num_rows
        assert len(np.unique(routed)) == min(point.num_adapters, len(routed))
        pages = [page for mine in point.pages() for page in mine]
        assert sorted(pages) == list(range(len(pages)))


def test_a_pool_is_as_wide_as_its_widest_adapter_unless_said_otherwise() -> None:
    assert Point(8, 4, MIXED).pool_rank == 64
    assert Point(8, 2, MIXED).pool_rank == 16
    assert Point(8, 2, (8,), max_rank=64).pool_rank == 64


@pytest.mark.parametrize(
    ("point", "micros"),
    [
        # 32 adapters of 16 * (38912 + 43008) elements.
        pytest.param(Point(32, 32, (16,)), 19.5, id="many_adapters"),
        pytest.param(Point(64, 64, (64,)), 156.1, id="wide_adapters"),
        pytest.param(Point(32, 1, (16,)), 0.61, id="one_adapter"),
        # Rank 8 has half the bytes of rank 16, whatever the pages.
        pytest.param(Point(32, 32, (8,), max_rank=64), 9.75, id="narrow_adapters"),
    ],
)
def test_the_floor_of_a_decode_step_is_its_adapters_weights(point: Point, micros: float) -> None:
    bandwidth = Bandwidth(read=4.3e12, copy=4.0e12)
    assert floors.floor_us(point, LLAMA_LAYER, 2, bandwidth) == pytest.approx(micros, rel=2e-3)


def test_the_floor_of_a_prompt_has_its_activations_too() -> None:
    point, bandwidth = Point(8192, 1, (16,)), Bandwidth(read=4.0e12, copy=2.0e12)
    # Of each row 225,280 bytes: x read once, y read and written.
    assert floors.moved_bytes(point, LLAMA_LAYER, 2) == 8192 * 225_280 + 2 * 16 * 81_920
    wanted = 8192 * 225_280 / 2.0e6 + 2 * 16 * 81_920 / 4.0e6
    assert floors.floor_us(point, LLAMA_LAYER, 2, bandwidth) == pytest.approx(wanted)


def test_parts_share_what_is_left_and_the_last_has_all_of_it() -> None:
    now = [100.0]
    budget = Budget(100, {"a": 1, "b": 1, "c": 2}, lambda: now[0])
    first = budget.begin("a")
    assert first.left_s == pytest.approx(25)
    now[0] += 5
    # What a left goes to those after it.
    assert budget.begin("b").left_s == pytest.approx(95 / 3)
    now[0] += 60
    last = budget.begin("c")
    assert last.left_s == pytest.approx(35)
    now[0] += 40
    assert last.is_over
    assert first.is_over
    with pytest.raises(ValueError, match="found 'a'"):
        budget.begin("a")


def test_a_part_that_is_left_out_gives_its_time_to_the_others() -> None:
    budget = Budget(100, {"a": 3, "b": 1}, lambda: 0.0)
    assert budget.begin("b").left_s == 100


@pytest.mark.parametrize(
    ("name", "label"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("AMD Instinct MI300X", "mi300x"), ("", "")],
)
def test_a_device_has_a_short_name(name: str, label: str) -> None:
    assert label_of(name) == label


def test_a_part_that_fails_ends_with_a_row_that_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> Iterator[str]:
        yield "first"
        raise RuntimeError("illegal memory access\nmore")

    assert list(guarded(failing(), str.upper)) == ["first", "FAILED: RUNTIMEERROR: ILLEGAL MEMORY ACCESS"]
    assert "Traceback" in capsys.readouterr().err


def test_a_package_that_is_not_there_is_missing_and_no_failure() -> None:
    def make() -> object:
        return importlib.import_module("no_such_package_at_all")

    assert attempt(make) == "missing: No module named 'no_such_package_at_all'"


def test_what_a_part_has_reserved_is_not_used_up_by_those_before() -> None:
    now = [0.0]
    budget = Budget(100, {"a": 1, "b": 1, "c": 1}, lambda: now[0], {"b": 40})
    assert budget.begin("a").left_s == pytest.approx(20)
    now[0] = 50.0
    assert budget.begin("b").left_s == pytest.approx(45)
    now[0] = 99.0
    assert budget.begin("c").left_s == pytest.approx(1)


NO_BACKEND = """
import runpy, sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("manylora", "msgspec"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Refusing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_the_backends_packages_the_kernels_are_measured_all_the_same(tmp_path: Path) -> None:
    suite = [str(BENCH / "gpu_suite.py"), "--cpu-logic", "--out", str(tmp_path), "--peers", str(tmp_path)]
    done = run_python("-c", NO_BACKEND, *suite, "--parts", "pool-rank", "copy", "model")
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "gpu_suite.csv").open() as file:
        found = [(row["part"], row["result"].partition(":")[0]) for row in csv.DictReader(file)]
    assert found == [("pool rank", "ok")] * 2 + [("copy", "missing"), ("decode", "missing")]


def test_a_run_that_is_ended_has_its_rows_and_goals(tmp_path: Path) -> None:
    suite = [str(BENCH / "gpu_suite.py"), "--cpu-logic", "--out", str(tmp_path), "--peers", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, *suite, "--parts", "pool-rank", "table"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        while "# pool-rank: took" not in (line := process.stdout.readline()):
            assert line, "it ended by itself"
        process.terminate()
        rest, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "verdict" in rest
    with (tmp_path / "gpu_goals.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(goals.GOALS)
    with (tmp_path / "gpu_suite.csv").open() as file:
        assert [row["part"] for row in csv.DictReader(file)] == ["pool rank"] * 2
