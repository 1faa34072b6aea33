"""What the compilers make of the attention kernels, for GPUs that need not be here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]

PROCESSES = (["sm_90"], ["sm_80", "sm_100", "gfx942"])
"""Targets that are compiled side by side."""
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Most shared memory of one program."""
LIMITS = {
    # Three programs of a decode's four warps fit a multiprocessor of sm_90; two do of sm_80.
    "attention-decode": (168, 76 << 10),
    "attention-prefill": (240, 113 << 10),
    "merge": (96, 8 << 10),
    "write-cache": (40, 8 << 10),
}
"""Most registers of a thread and shared memory of a program on CUDA."""
PREFILL_SHARED_BYTES = {"sm_80": 81 << 10, "sm_90": 113 << 10, "sm_100": 113 << 10}
"""So that shared memory holds two programs of a prompt's attention."""
AMD_LIMITS = {"attention-decode": (256, 34 << 10), "attention-prefill": (256, 32 << 10)}
"""The same for gfx942: two waves of a SIMD, one program of a decode and two of a prompt."""


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


def test_registers_and_shared_memory_stay_under_their_caps(compiled: Rows) -> None:
    assert len(compiled) == 4 * 6 + 3 + 2
    wrong = []
    for row in compiled:
        limits = AMD_LIMITS if row["target"] == "gfx942" else LIMITS
        registers, shared = next(most for kind, most in limits.items() if row["kernel"].startswith(kind))
        if row["reg"] > registers or row["shared"] > shared:
            wrong.append(row)
    assert wrong == []


def test_shared_memory_holds_two_programs_of_a_prompt(compiled: Rows) -> None:
    mine = [row for row in compiled if row["kernel"].startswith("attention-prefill")]
    mine = [row for row in mine if row["target"] != "gfx942"]
    assert len(mine) == 3 * 3 + 2
    assert [row for row in mine if row["shared"] > PREFILL_SHARED_BYTES[row["target"]]] == []


def test_attention_uses_matrix_instructions(compiled: Rows) -> None:
    mine = attention_rows(compiled)
    assert len(mine) == 4 * 6 + 3
    assert [row for row in mine if not row["tensor_core"]] == []


def test_attention_moves_no_single_elements(compiled: Rows) -> None:
    assert [row for row in compiled if row["narrow_loads"] or row["narrow_stores"]] == []
