"""Attention of decodes in Triton against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from manylora_kernels import reference
from manylora_kernels.attention import plan as attention_plan
from manylora_kernels.attention.decode import decode_attention
from manylora_kernels.attention.plan import Gpu, Scoring

from .attention_rules import SCORINGS, TOLERANCE, scoring

SHAPES: dict[str, dict[str, Any]] = {
    "one_row": {"heads": (4, 2), "sizes": (64, 64), "contexts": [1]},
    "33_sequences": {"heads": (2, 1), "sizes": (16, 16), "contexts": [1 + (7 * i) % 40 for i in range(33)]},
    "contexts_that_fill_no_block": {"heads": (4, 2), "sizes": (64, 64), "contexts": [17, 5, 129]},
    "blocks_of_32": {"heads": (4, 2), "sizes": (32, 32), "contexts": [33, 70], "block_size": 32},
    "blocks_of_3": {"heads": (2, 2), "sizes": (16, 16), "contexts": [10, 3], "block_size": 3},
    "one_key_head": {"heads": (8, 1), "sizes": (64, 64), "contexts": [9, 50]},
    "a_key_head_for_each_query_head": {"heads": (5, 5), "sizes": (16, 16), "contexts": [9, 30]},
    "17_queries_per_key": {"heads": (34, 2), "sizes": (16, 16), "contexts": [20]},
    "size_80": {"heads": (6, 2), "sizes": (80, 80), "contexts": [21, 65]},
    "size_96": {"heads": (3, 1), "sizes": (96, 96), "contexts": [40]},
    "size_128": {"heads": (4, 1), "sizes": (128, 128), "contexts": [70]},
    "size_256": {"heads": (2, 1), "sizes": (256, 256), "contexts": [40]},
    "larger_keys": {"heads": (4, 2), "sizes": (48, 32), "contexts": [7, 33]},
    "larger_values": {"heads": (4, 2), "sizes": (20, 72), "contexts": [7, 33]},
}


def decode(case: Any, layer: Scoring, num_splits: int = 1, seqs: slice = slice(None)) -> torch.Tensor:
    """[B, H, E], by the plan of the shapes but for its splits."""
    q = case.q[:, seqs]
    num_heads, num_seqs, key_size = q.shape
    num_kv = case.keys.shape[1] // key_size
    plan = attention_plan.decode(
        num_seqs=num_seqs,
        num_kv=num_kv,
        per_kv=num_heads // num_kv,
        max_visible=case.batch.max_context,
        largest_size=max(key_size, case.values.shape[1] // num_kv),
        dtype=q.dtype,
        gpu=Gpu.of(q.device),
    )
    out = torch.full(
        (num_seqs, num_heads, case.values.shape[1] // num_kv), torch.nan, dtype=q.dtype, device=q.device
    )
    no_sinks = torch.full((num_heads,), float("-inf"), device=q.device)
    decode_attention(
        out=out,
        q=q,
        keys=case.keys,
        values=case.values,
        tables=case.batch.tables[seqs],
        contexts=case.batch.contexts[seqs],
        sinks=no_sinks if layer.sinks is None else layer.sinks,
        block_size=case.batch.block_size,
        scoring=layer,
        plan=replace(plan, num_splits=num_splits),
    )
    return out


def check(case: Any, layer: Scoring, found: torch.Tensor) -> None:
    expected = reference.attention(case.q, case.keys, case.values, case.batch, layer)
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(
    shape: str, triton_dtype: torch.dtype, triton_device: str, make_paged_case: Any, poisoned_memory: Any
) -> None:
    queries = [1] * len(SHAPES[shape]["contexts"])
    case = make_paged_case(queries=queries, dtype=triton_dtype, device=triton_device, **SHAPES[shape])
    layer = scoring(triton_device, case.q.shape[0])
    with poisoned_memory():
        found = decode(case, layer)
    check(case, layer, found)


@pytest.mark.parametrize("num_splits", [1, 3, 20])
@pytest.mark.parametrize("rule", SCORINGS)
def test_windows_caps_sinks_and_splits_agree_with_the_reference(
    rule: str,
    num_splits: int,
    triton_dtype: torch.dtype,
    triton_device: str,
    make_paged_case: Any,
    poisoned_memory: Any,
) -> None:
    """The longest context has three parts at most: further programs find nothing to do."""
    case = make_paged_case((4, 2), (16, 16), [1] * 4, [300, 1, 129, 128], triton_dtype, triton_device)
    layer = scoring(triton_device, 4, **SCORINGS[rule])
    with poisoned_memory():
        found = decode(case, layer, num_splits)
    check(case, layer, found)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_the_same_step_gives_the_same_bits(
    num_splits: int, triton_dtype: torch.dtype, triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case((4, 2), (16, 16), [1] * 3, [400, 20, 170], triton_dtype, triton_device)
    layer = scoring(triton_device, 4)
    assert torch.equal(decode(case, layer, num_splits), decode(case, layer, num_splits))


def test_with_as_many_splits_a_sequence_has_the_same_bits_alone(
    triton_dtype: torch.dtype, triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case((4, 2), (16, 16), [1] * 3, [400, 20, 170], triton_dtype, triton_device)
    layer = scoring(triton_device, 4)
    together = decode(case, layer, num_splits=4)
    for seq in range(3):
        alone = decode(case, layer, num_splits=4, seqs=slice(seq, seq + 1))
        assert torch.equal(alone[0], together[seq])


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("sinks", [False, True], ids=["no_sinks", "sinks"])
def test_a_sequence_without_context_gives_zeros(
    num_splits: int, sinks: bool, triton_device: str, make_paged_case: Any, poisoned_memory: Any
) -> None:
    """As the rows have that fill a captured graph's batch."""
    case = make_paged_case((4, 2), (16, 16), [1, 1], [30, 30], torch.float32, triton_device)
    layer = scoring(triton_device, 4, sinks)
    whole = decode(case, layer, num_splits)
    case.batch.contexts[1] = 0
    case.batch.tables[1] = 0
    with poisoned_memory():
        found = decode(case, layer, num_splits)
    assert torch.equal(found[0], whole[0])
    assert (found[1] == 0).all()


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_key_that_is_no_number_is_not_hidden(
    num_splits: int, triton_device: str, make_paged_case: Any
) -> None:
    case = make_paged_case((4, 2), (16, 16), [1, 1], [300, 40], torch.float32, triton_device)
    row = int(case.batch.tables[0, 5]) * 16 + 3
    case.keys[row] = torch.nan
    found = decode(case, scoring(triton_device, 4), num_splits)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_scores_far_apart_leave_the_best_alone(triton_device: str, make_paged_case: Any) -> None:
    case = make_paged_case((2, 1), (16, 16), [1], [200], torch.float32, triton_device)
    rows = (case.batch.tables[0, :, None] * 16 + torch.arange(16, device=triton_device)).view(-1)[:200]
    case.keys[rows] = -1000.0
    case.keys[rows[150]] = 1000.0
    case.q.fill_(1.0)
    found = decode(case, scoring(triton_device, 2), num_splits=2)
    torch.testing.assert_close(found[0], case.values[rows[150]].expand(2, -1))
