"""What the compilers make of the kernels, for GPUs that need not be here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]

WITHOUT_PRODUCT = ("route", "base_silu_mul-bf16")
"""Kernels that multiply no matrices."""

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Most shared memory of one program."""

CAPS = {
    # Several programs share a multiprocessor, so that enough bytes are under way: six by registers, three by
    # shared memory.
    "shrink-decode": (80, 75 << 10),
    "expand-decode": (64, 24 << 10),
    "silu_mul-decode": (64, 24 << 10),
    # The same with six programs by registers.
    "silu_mul-decode-vectors": (80, 24 << 10),
    # Four programs by registers, three by shared memory.
    "shrink-chunk": (128, 75 << 10),
    "expand-chunk": (128, 32 << 10),
    "silu_mul-chunk": (128, 32 << 10),
    # One program of eight warps, whose sums fill the registers.
    "shrink-prefill": (255, 164 << 10),
    # Two programs of eight warps, or of four.
    "expand-prefill": (128, 32 << 10),
    "silu_mul-prefill": (255, 32 << 10),
    "route": (128, 16 << 10),
    # Eight programs of 128 threads on a multiprocessor, at the least.
    "base_silu_mul-bf16": (64, 0),
}
"""Most registers of a thread and shared memory of a program, for 16-bit kernels on CUDA."""

AMD_CAPS = {
    # So that a SIMD holds four waves, and shared memory three programs.
    "shrink-decode": (128, 21 << 10),
    "expand-decode": (128, 21 << 10),
    "expand-chunk": (128, 21 << 10),
    "expand-prefill": (128, 21 << 10),
    "route": (128, 21 << 10),
    "base_silu_mul-bf16": (128, 0),
    # Two waves, and at least one program.
    "shrink-chunk": (256, 32 << 10),
    "shrink-prefill": (256, 64 << 10),
    "silu_mul-prefill": (256, 32 << 10),
}
"""The same for gfx942."""

PROCESSES = (["sm_90"], ["sm_80", "sm_100", "gfx942"])
"""Targets that are compiled side by side."""


@pytest.fixture(scope="module")
def compiled(compile_apart: Callable[..., Rows]) -> Rows:
    """Every kernel for every target."""
    return compile_apart("compile_kernels.py", *PROCESSES)


@pytest.fixture
def shipped(compiled: Rows) -> Rows:
    """Without the one kernel that is there to be caught."""
    return [row for row in compiled if row["kernel"] != "unaligned"]


def on_cuda(rows: Rows) -> Rows:
    """The 16-bit kernels whose machine code is read."""
    return [row for row in rows if row["target"].startswith("sm_") and "fp32" not in row["kernel"]]


@pytest.mark.parametrize("target", list(SHARED_BYTES))
def test_every_kernel_compiles_for(target: str, compiled: Rows) -> None:
    kernels = {row["kernel"] for row in compiled if row["target"] == target}
    steps = [
        f"{kernel}-{step}-qkv-bf16-4_pages"
        for kernel in ("shrink", "expand")
        for step in ("decode", "chunk", "prefill")
    ]
    assert kernels >= {"route", "base_silu_mul-bf16", "silu_mul-prefill-gate_up-bf16-4_pages", *steps}
    with_vectors = {f"{kernel}-prefill-gate_up-bf16-4_pages-vectors" for kernel in ("expand", "silu_mul")}
    assert kernels >= with_vectors


def test_nothing_spills(shipped: Rows) -> None:
    assert [row for row in shipped if row["spills"] or row.get("stack") or row.get("local")] == []


def test_shared_memory_is_enough(shipped: Rows) -> None:
    assert [row for row in shipped if row["shared"] > SHARED_BYTES[row["target"]]] == []


def test_registers_and_shared_memory_stay_under_their_caps(shipped: Rows) -> None:
    wrong = []
    for row in shipped:
        if "invariant" in row["kernel"] or "fp32" in row["kernel"]:
            continue  # One set of tiles for every step, or no tensor cores: slower, and known to be.
        kind = "-".join(row["kernel"].split("-")[:2])
        caps = AMD_CAPS if row["target"] == "gfx942" else CAPS
        with_vectors = f"{kind}-vectors" if row["kernel"].endswith("-vectors") else kind
        registers, shared = caps.get(with_vectors, caps[kind])
        if row["reg"] > registers or row["shared"] > shared:
            wrong.append(row)
    assert wrong == []


def test_16_bit_kernels_use_tensor_cores(shipped: Rows) -> None:
    mine = [row for row in shipped if row["kernel"] not in WITHOUT_PRODUCT and "fp32" not in row["kernel"]]
    assert {row["target"] for row in mine} == set(SHARED_BYTES)
    assert len(mine) >= 45
    assert [row for row in mine if not row["tensor_core"]] == []


def test_every_load_of_a_weight_is_of_128_bits(shipped: Rows) -> None:
    mine = [row for row in on_cuda(shipped) if row["kernel"] not in WITHOUT_PRODUCT]
    assert [row for row in mine if set(row["weight_load_bits"]) != {"128"}] == []


def test_16_bit_kernels_move_no_single_elements(shipped: Rows) -> None:
    assert all("narrow_loads" in row and "narrow_stores" in row for row in shipped)
    # A tile of scale and of offset is as wide as the program has threads: one element each, side by side.
    allowed = {row["kernel"]: 2 if row["kernel"].endswith("-vectors") else 0 for row in shipped}
    wrong = [row for row in shipped if row["narrow_loads"] > allowed[row["kernel"]] or row["narrow_stores"]]
    assert wrong == []


def test_dependent_launch_is_used_where_the_card_has_it(shipped: Rows) -> None:
    mine = [row for row in on_cuda(shipped) if row["kernel"] not in WITHOUT_PRODUCT]
    wrong = [
        row
        for row in mine
        if bool(row["dependent_launch"]) != (row["target"] != "sm_80" and "unchained" not in row["kernel"])
    ]
    assert wrong == []


def test_kernels_of_graphs_compile_without_a_dependent_launch(shipped: Rows) -> None:
    kernels = {row["kernel"].partition("-")[0] for row in shipped if "unchained" in row["kernel"]}
    assert kernels == {"shrink", "expand", "silu_mul"}


def test_single_elements_are_seen_where_columns_are_not_aligned(compiled: Rows) -> None:
    (row,) = [row for row in compiled if row["kernel"] == "unaligned"]
    assert row["narrow_loads"]
    assert row["narrow_stores"]
    assert set(row["weight_load_bits"]) == {"16"}
