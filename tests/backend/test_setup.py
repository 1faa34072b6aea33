"""The scripts that set a checkout up, where it is not set up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import setup

ROOT = Path(__file__).resolve().parents[2]


def test_perf_analyzer_is_not_installed_into_a_checkout_that_is_not_set_up(tmp_path: Path) -> None:
    script = Path("bench") / "perf_analyzer" / "install.py"
    for path in (script, Path("scripts") / "setup.py", Path("constraints.txt")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)

    def said(*options: str) -> str:
        done = subprocess.run(
            [sys.executable, *options, tmp_path / script],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        return line

    assert said().startswith("perf_analyzer: ")
    assert said().endswith("/.venv/bin/python: No such file or directory; run `make setup` first")
    # Neither the environment's packages nor PYTHONPATH: an interpreter that knows nothing of the checkout.
    assert "No module named 'scripts'; run `make setup` first" in said("-S", "-E")


def test_commands_find_the_packages_of_a_checkout_and_none_of_its_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / ".venv" / "lib" / "site-packages"
    site.mkdir(parents=True)
    for name in (*setup.CHECKOUT_PACKAGES, "kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "here.py").touch()
    monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup, "PATH_FILE", site / setup.PATH_FILE.name)
    for _ in range(2):
        setup.make_checkout_importable()
    program = f"""
import importlib.util, site
site.addsitedir({str(site)!r})
import bench.here, examples.here, scripts.here
print(importlib.util.find_spec("kernels"))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "None\n", done.stderr
