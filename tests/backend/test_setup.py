"""The scripts that set a checkout up, where it is not set up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
