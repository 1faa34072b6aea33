"""The scripts that set a checkout up, where it is not set up."""

from __future__ import annotations

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
    done = subprocess.run([sys.executable, tmp_path / script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("perf_analyzer: ")
    assert line.endswith("/.venv/bin/python: No such file or directory; run `make setup` first")
