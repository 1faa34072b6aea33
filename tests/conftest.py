"""What tests of several packages need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def pass_interpreted() -> Callable[..., str]:
    """Run test files in a process of their own with triton's interpreter, which must be on before triton is
    imported: `pass_interpreted(file, ...)` returns what pytest printed; all of them pass."""

    def run(*files: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
            env={
                **os.environ,
                "TRITON_INTERPRET": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
