"""A lease of a GPU: a part that fails costs no other part anything, and nothing outlives its limit."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu import lease_files, lease_tests
from bench.loadtest.origin import Origin

from .programs import run_python

LEASE = '''
import argparse, sys
from pathlib import Path
from bench import gpu_suite
from bench.gpu import lease

# Runs beyond its limit, and so does what it has started in a session of its own.
HANGS = """
import os, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open("pids", "w").write(f"{os.getpid()} {other.pid}")
time.sleep(600)
"""
PROGRAMS = {"hangs": HANGS, "crashes": "import os; os.abort()", "works": "open('worked', 'w')"}
lease.STAGES = (lease.Stage("hangs", 4 / lease.PATIENCE), lease.Stage("crashes", 30), lease.Stage("works", 0))


class Ours(lease.Lease):
    def _command(self, stage, until):
        program = PROGRAMS[stage.name]
        return [sys.executable, "-c", f"import os; os.chdir({str(self._out)!r})\\n{program}"]


lease.Lease = Ours
sys.argv = ["gpu_suite.py", "--cpu-logic", "--lease", "--out", sys.argv[1], "--budget-s", sys.argv[2]]
sys.exit(gpu_suite.main())
'''


def rows_of(folder: Path) -> list[tuple[str, str, str]]:
    with (folder / "gpu_suite.csv").open() as file:
        return [(row["part"], row["form"], row["result"]) for row in csv.DictReader(file)]


def test_a_part_that_hangs_or_crashes_costs_only_itself(tmp_path: Path) -> None:
    done = run_python("-c", LEASE, tmp_path, "100")
    assert done.returncode == 1, done.stdout + done.stderr
    hung, *others = rows_of(tmp_path)
    assert hung[:2] == ("hangs", "whole part")
    assert hung[2].startswith("failed: killed after ")
    assert others == [
        ("crashes", "whole part", "failed: the process ended with status -6"),
    ]
    assert (tmp_path / "worked").exists()
    # Nothing of the process that hung goes on, so that nothing of it keeps the device.
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    assert not any(Path("/proc", pid).exists() for pid in pids)
    assert (tmp_path / "gpu_goals.csv").exists()


def test_what_there_is_no_time_for_says_so(tmp_path: Path) -> None:
    done = run_python("-c", LEASE, tmp_path, "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {result for _, _, result in rows_of(tmp_path)} == {"missing: no time was left for it"}
    assert not (tmp_path / "worked").exists()


TESTS = """
import pytest, warnings

def test_that_needs_none(): pass

@pytest.mark.gpu
def test_that_is_right(): pass

@pytest.mark.gpu
def test_that_is_wrong():
    assert 1 == 2, "one, two"

def test_of_another_form_that_is_wrong():
    raise ValueError("first line\\nsecond line")
"""


@pytest.mark.parametrize("has_time", [True, False])
def test_tests_that_need_a_gpu_come_first_and_each_is_a_row(has_time: bool, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_not_asked_for.py").write_text("def test_nothing(): raise ValueError")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    origin = dict.fromkeys(Origin.__dataclass_fields__, "") | {"threads": 1, "triton": ""}
    told = {"origin": origin, "out": str(tmp_path), "until": 4e9 if has_time else 0}
    told |= {"unmarked": ["test_some.py"]}
    run_python(
        *("-m", "pytest", "-q", "-p", "bench.gpu.lease_tests", "-p", "no:cacheprovider", "."),
        folder=tmp_path,
        **{lease_tests.ENVIRONMENT: json.dumps(told)},
    )
    rows = [
        ("tests", "test_some.py::test_that_is_right", "ok"),
        ("tests", "test_some.py::test_that_is_wrong", "failed: AssertionError: one, two"),
        ("tests", "test_some.py::test_of_another_form_that_is_wrong", "failed: ValueError: first line"),
        ("tests", "test_some.py", "failed: 1 failed, 1 passed"),
    ]
    # What has begun is told of, and nothing more is begun.
    assert rows_of(tmp_path) == (rows if has_time else rows[:1])


def test_only_wheels_for_this_python_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    mine = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for tag in (mine, "cp39"):
        with zipfile.ZipFile(tmp_path / "wheels" / f"some-1.0-{tag}-{tag}-any.whl", "w") as archive:
            archive.writestr(f"some/{tag}.py", "")
    assert lease_files.unpack(tmp_path, tmp_path / "site") == [f"some-1.0-{mine}-{mine}-any.whl"]
    assert [path.name for path in (tmp_path / "site" / "some").iterdir()] == [f"{mine}.py"]
    assert lease_files.unpack(tmp_path / "nowhere", tmp_path / "site") == []
