"""What the compilers make of the kernels, for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
Rows = list[dict[str, Any]]

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Most shared memory of one program."""
DECODE_LIMITS = {"reg": 168, "shared": 76 << 10}
"""So that three programs of a decode's four warps fit a multiprocessor of sm_90; two do of sm_80."""
PREFILL_SHARED_BYTES = {"sm_80": 81 << 10, "sm_90": 113 << 10, "sm_100": 113 << 10}
"""So that shared memory holds two programs of a prompt's attention."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Every kernel for every target, compiled from nothing in a process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def shipped(compiled: Rows) -> Rows:
    """Without the one kernel that is there to be caught."""
    return [row for row in compiled if row["kernel"] != "unaligned"]


def attention_rows(rows: Rows) -> Rows:
    return [row for row in rows if row["kernel"].startswith("attention-")]


@pytest.mark.parametrize("target", list(SHARED_BYTES))
def test_every_kernel_compiles_for(target: str, compiled: Rows) -> None:
    kernels = {row["kernel"] for row in compiled if row["target"] == target}
    steps = [f"{kernel}-{step}-bf16" for kernel in ("shrink", "expand") for step in ("decode", "prefill")]
    attention = [f"attention-{step}-{size}" for step in ("decode", "prefill") for size in (64, 128, 256)]
    assert kernels >= {"route", *steps, *attention}


def test_nothing_spills(shipped: Rows) -> None:
    assert [row for row in shipped if row["spills"] or row.get("stack") or row.get("local")] == []


def test_shared_memory_is_enough(shipped: Rows) -> None:
    assert [row for row in shipped if row["shared"] > SHARED_BYTES[row["target"]]] == []


def test_attention_leaves_room_for_further_programs(shipped: Rows) -> None:
    mine = [row for row in attention_rows(shipped) if row["target"] != "gfx942"]
    decodes = [row for row in mine if row["kernel"].startswith("attention-decode")]
    prefills = [row for row in mine if row["kernel"].startswith("attention-prefill")]
    assert len(decodes) == 3 * 3 + 1
    assert len(prefills) == 3 * 3 + 2
    for name, most in DECODE_LIMITS.items():
        assert [row for row in decodes if row[name] > most] == []
    assert [row for row in prefills if row["shared"] > PREFILL_SHARED_BYTES[row["target"]]] == []


def test_16_bit_kernels_use_tensor_cores(shipped: Rows) -> None:
    mine = [row for row in shipped if "16" in row["kernel"] and row["target"].startswith("sm_")]
    assert len(mine) == 16
    mine += attention_rows(shipped)
    assert len(mine) == 16 + 4 * 6 + 3
    assert [row for row in mine if not row["tensor_core"]] == []


def test_16_bit_kernels_move_no_single_elements(shipped: Rows) -> None:
    assert [row for row in shipped if row.get("narrow_loads") or row.get("narrow_stores")] == []


def test_single_elements_are_seen_where_columns_are_not_aligned(compiled: Rows) -> None:
    (row,) = [row for row in compiled if row["kernel"] == "unaligned"]
    assert row["narrow_loads"]
    assert row["narrow_stores"]
