"""Plans of attention follow from shapes alone and stay within their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from manylora_kernels.attention import plan as attention_plan
from manylora_kernels.attention.plan import SPLIT_TOKENS, Gpu, Scoring, TilePlan

HOPPER = Gpu(9)


def decode(**changes: Any) -> TilePlan:
    given = {
        "num_seqs": 1,
        "num_kv": 8,
        "per_kv": 4,
        "max_visible": 8192,
        "largest_size": 128,
        "dtype": torch.bfloat16,
        "gpu": HOPPER,
    }
    return attention_plan.decode(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "num_splits"),
    [
        ({}, 32),
        ({"num_seqs": 8}, 4),
        ({"num_seqs": 64}, 4),
        ({"num_seqs": 64, "max_visible": 2048}, 1),
        ({"max_visible": 300}, 3),
        ({"max_visible": 128}, 1),
        ({"max_visible": 128, "num_splits": 7}, 7),
        ({"num_seqs": 64, "max_visible": 1 << 20}, 32),
    ],
    ids=["few_programs", "some", "many", "many_and_short", "short", "one_part", "fixed", "very_long"],
)
def test_contexts_are_split_where_programs_lack(changes: dict[str, Any], num_splits: int) -> None:
    assert decode(**changes).num_splits == num_splits


def test_parts_are_whole_tiles() -> None:
    for size in (16, 64, 80, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            assert SPLIT_TOKENS % decode(largest_size=size, dtype=dtype).block_tokens == 0


@pytest.mark.parametrize("per_kv", [1, 3, 16, 17, 71])
def test_a_tile_has_a_row_for_each_query_of_a_key(per_kv: int) -> None:
    assert decode(per_kv=per_kv).block_rows >= max(16, per_kv)
    for dtype in (torch.float32, torch.bfloat16):
        for max_queries in (2, 5000):
            chosen = attention_plan.prefill(
                max_queries=max_queries, per_kv=per_kv, largest_size=64, dtype=dtype, gpu=HOPPER
            )
            assert chosen.block_rows >= per_kv


def test_a_device_without_cuda_counts_as_the_default() -> None:
    assert Gpu.of(torch.device("cpu")) == Gpu()


def test_scores_are_in_powers_of_two() -> None:
    assert Scoring(scaling=0.5).factor == pytest.approx(0.5 * 1.442695)
    capped = Scoring(scaling=0.5, softcap=20.0)
    assert capped.factor == pytest.approx(2 * 1.442695 * 0.5 / 20)
    assert capped.cap == pytest.approx(20 * 1.442695)
