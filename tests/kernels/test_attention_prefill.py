"""Attention of prompts in Triton against the reference: whole, in chunks, packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from manylora_kernels import reference
from manylora_kernels.attention import plan as attention_plan
from manylora_kernels.attention.plan import Gpu, Scoring
from manylora_kernels.attention.prefill import prefill_attention

from .attention_rules import SCORINGS, TOLERANCE, scoring

SHAPES: dict[str, dict[str, Any]] = {
    "a_whole_prompt": {"heads": (4, 2), "sizes": (32, 32), "queries": [37], "contexts": [37]},
    "a_later_chunk": {"heads": (4, 2), "sizes": (32, 32), "queries": [5], "contexts": [70]},
    "two_rows": {"heads": (1, 1), "sizes": (64, 64), "queries": [2], "contexts": [2]},
    "33_sequences": {
        "heads": (2, 1),
        "sizes": (16, 16),
        "queries": [2 + i % 4 for i in range(33)],
        "contexts": [2 + i % 4 + (5 * i) % 23 for i in range(33)],
    },
    "lengths_around_a_tile": {
        "heads": (2, 1),
        "sizes": (16, 16),
        "queries": [63, 2, 64, 65],
        "contexts": [63, 80, 64, 65],
    },
    "three_queries_per_key": {"heads": (6, 2), "sizes": (16, 16), "queries": [30, 50], "contexts": [35, 50]},
    "40_queries_per_key": {"heads": (40, 1), "sizes": (16, 16), "queries": [3], "contexts": [19]},
    "blocks_of_32": {
        "heads": (2, 2),
        "sizes": (32, 32),
        "queries": [40],
        "contexts": [75],
        "block_size": 32,
    },
    "size_80": {"heads": (2, 1), "sizes": (80, 80), "queries": [20], "contexts": [33]},
    "size_96": {"heads": (2, 1), "sizes": (96, 96), "queries": [20], "contexts": [33]},
    "size_128": {"heads": (2, 1), "sizes": (128, 128), "queries": [20], "contexts": [33]},
    "size_256": {"heads": (2, 1), "sizes": (256, 256), "queries": [20], "contexts": [33]},
    "larger_keys": {"heads": (4, 2), "sizes": (48, 32), "queries": [20, 7], "contexts": [33, 7]},
    "larger_values": {"heads": (4, 2), "sizes": (20, 72), "queries": [20, 7], "contexts": [33, 7]},
}


def prefill(case: Any, layer: Scoring) -> torch.Tensor:
    """[T, H, E]"""
    num_heads, num_rows, key_size = case.q.shape
    num_kv = case.keys.shape[1] // key_size
    value_size = case.values.shape[1] // num_kv
    plan = attention_plan.prefill(
        max_queries=case.batch.max_queries,
        per_kv=num_heads // num_kv,
        largest_size=max(key_size, value_size),
        dtype=case.q.dtype,
        gpu=Gpu.of(case.q.device),
    )
    out = torch.full((num_rows, num_heads, value_size), torch.nan, dtype=case.q.dtype, device=case.q.device)
    no_sinks = torch.full((num_heads,), float("-inf"), device=case.q.device)
    prefill_attention(
        out=out,
        q=case.q,
        keys=case.keys,
        values=case.values,
        tables=case.batch.tables,
        contexts=case.batch.contexts,
        starts=case.batch.starts,
        sinks=no_sinks if layer.sinks is None else layer.sinks,
        block_size=case.batch.block_size,
        scoring=layer,
        plan=plan,
    )
    return out


def check(case: Any, layer: Scoring, found: torch.Tensor) -> None:
    expected = reference.attention(case.q, case.keys, case.values, case.batch, layer)
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(
    shape: str, triton_dtype: torch.dtype, triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case(dtype=triton_dtype, device=triton_device, **SHAPES[shape])
    layer = scoring(triton_device, case.q.shape[0])
    check(case, layer, prefill(case, layer))


@pytest.mark.parametrize("rule", SCORINGS)
def test_windows_caps_and_sinks_agree_with_the_reference(
    rule: str, triton_dtype: torch.dtype, triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case((4, 2), (16, 16), [40, 3, 9], [40, 75, 30], triton_dtype, triton_device)
    layer = scoring(triton_device, 4, **SCORINGS[rule])
    check(case, layer, prefill(case, layer))


def test_the_same_step_gives_the_same_bits(
    triton_dtype: torch.dtype, triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case((4, 2), (16, 16), [40, 3, 9], [40, 75, 30], triton_dtype, triton_device)
    layer = scoring(triton_device, 4, window=20)
    assert torch.equal(prefill(case, layer), prefill(case, layer))


@pytest.mark.parametrize("window", [0, 20], ids=["all", "window"])
def test_rows_of_a_sequence_without_context_give_zeros(
    window: int, triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case((2, 1), (16, 16), [150, 9], [150, 30], torch.float32, triton_device)
    layer = scoring(triton_device, 2, window=window)
    expected = prefill(case, layer)[150:]
    # Block -1 would be read from before the cache.
    case.batch.tables[0] = -1
    case.batch.contexts[0] = 0
    found = prefill(case, layer)
    assert not found[:150].any()
    assert torch.equal(found[150:], expected)


def test_a_key_that_is_no_number_is_not_hidden(triton_device: str, make_paged_case: Any) -> None:
    case = make_paged_case((2, 1), (16, 16), [20, 9], [20, 30], torch.float32, triton_device)
    case.keys[int(case.batch.tables[0, 0]) * 16 + 12] = torch.nan
    found = prefill(case, scoring(triton_device, 2))
    assert found[:12].isfinite().all()
    assert found[12:20].isnan().all()
    assert found[20:].isfinite().all()
