"""What the compilers make of the attention kernels, for GPUs that need not be here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Rows = list[dict[str, Any]]

PROCESSES = (["sm_90"], ["sm_80", "sm_100", "gfx942"])
"""Targets that are compiled side by side."""
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Most shared memory of one program."""
DECODE_LIMITS = {"reg": 168, "shared": 76 << 10}
"""So that three programs of a decode's four warps fit a multiprocessor of sm_90; two do of sm_80."""
PREFILL_SHARED_BYTES = {"sm_80": 81 << 10, "sm_90": 113 << 10, "sm_100": 113 << 10}
"""So that shared memory holds two programs of a prompt's attention."""


@pytest.fixture(scope="module")
def compiled(compile_apart: Callable[..., Rows]) -> Rows:
    """Every kernel for every target."""
    return compile_apart("compile_attention.py", *PROCESSES)


def attention_rows(rows: Rows) -> Rows:
    return [row for row in rows if row["kernel"].startswith("attention-")]


@pytest.mark.parametrize("target", list(SHARED_BYTES))
def test_attention_compiles_for(target: str, compiled: Rows) -> None:
    kernels = {row["kernel"] for row in compiled if row["target"] == target}
    assert kernels >= {
        f"attention-{step}-{size}" for step in ("decode", "prefill") for size in (64, 128, 256)
    }


def test_nothing_spills(compiled: Rows) -> None:
    assert [row for row in compiled if row["spills"] or row.get("stack") or row.get("local")] == []


def test_shared_memory_is_enough(compiled: Rows) -> None:
    assert [row for row in compiled if row["shared"] > SHARED_BYTES[row["target"]]] == []


def test_attention_leaves_room_for_further_programs(compiled: Rows) -> None:
    mine = [row for row in attention_rows(compiled) if row["target"] != "gfx942"]
    decodes = [row for row in mine if row["kernel"].startswith("attention-decode")]
    prefills = [row for row in mine if row["kernel"].startswith("attention-prefill")]
    assert len(decodes) == 3 * 3 + 1
    assert len(prefills) == 3 * 3 + 2
    for name, most in DECODE_LIMITS.items():
        assert [row for row in decodes if row[name] > most] == []
    assert [row for row in prefills if row["shared"] > PREFILL_SHARED_BYTES[row["target"]]] == []


def test_attention_uses_matrix_instructions(compiled: Rows) -> None:
    mine = attention_rows(compiled)
    assert len(mine) == 4 * 6 + 3
    assert [row for row in mine if not row["tensor_core"]] == []


def test_attention_moves_no_single_elements(compiled: Rows) -> None:
    assert [row for row in compiled if row.get("narrow_loads") or row.get("narrow_stores")] == []
