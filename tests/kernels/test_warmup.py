"""Nothing is compiled while a server runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora_kernels import ServedShapes, SiteShape, warmup

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    """Compilations before and while steps of every number of rows are served, with all kinds of mixes."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(HERE / "count_compilations.py")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_compilations_are_seen_without_a_warmup(counts: dict[str, Any]) -> None:
    assert counts["cold"] > 0


@pytest.mark.parametrize("plans", ["by_rows", "batch_invariant"])
def test_nothing_is_compiled_after_a_warmup(plans: str, counts: dict[str, Any]) -> None:
    assert counts[plans]["before"] > 0
    assert counts[plans]["while_serving"] == 0


def test_served_shapes_refuse_no_rows() -> None:
    with pytest.raises(ValueError, match=r"row_counts: found \(\), allowed at least one"):
        ServedShapes(
            sites=(SiteShape(8, (8,)),),
            row_counts=(),
            max_slots=1,
            max_pages=1,
            dtype=torch.float32,
            pool_dtype=torch.float32,
        )


def test_a_warmup_of_a_cpu_takes_shapes_too() -> None:
    shapes = ServedShapes(
        sites=(SiteShape(8, (8,)),),
        row_counts=(1,),
        max_slots=1,
        max_pages=1,
        dtype=torch.float32,
        pool_dtype=torch.float32,
    )
    warmup("cpu", shapes)
