"""Route, shrink and expand together, as the engine calls them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from manylora_kernels import SitePool, reference
from manylora_kernels.lora.expand import expand
from manylora_kernels.lora.routed import RoutedMix
from manylora_kernels.lora.shrink import shrink
from manylora_kernels.lora.triton_form import TRITON


def test_agrees_with_the_reference(
    step: str, triton_dtype: torch.dtype, triton_device: str, make_case: Any, agrees: Any
) -> None:
    case = make_case(step, triton_dtype, triton_device)
    expected = case.expected()
    mix = case.routed()
    TRITON.add_lora(case.y, case.x, case.pool, mix, 0)
    agrees(case.y, expected)


def test_takes_a_pool_of_another_dtype(triton_device: str, make_case: Any) -> None:
    case = make_case("rank_24_and_40", torch.float32, triton_device)
    pool = SitePool(case.pool.a.half(), case.pool.b.half(), case.pool.widths)
    expected = case.y.clone()
    reference.add_lora(expected, case.x, pool, case.slots.tolist(), case.scales.tolist(), case.pages)
    mix = case.routed()
    TRITON.add_lora(case.y, case.x, pool, mix, 0)
    # The operands are rounded to the pool's dtype, the result is not.
    torch.testing.assert_close(case.y, expected, rtol=8e-3, atol=8e-3)


def test_prefill_blocks_agree_with_the_reference(triton_device: str) -> None:
    """More rows than decode has, so that blocks are of 64 rows."""
    slots = np.array([0] * 70 + [-1] * 30 + [1] * 413, dtype=np.int32)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(513, 32, generator=generator).to(triton_device)
    y = torch.randn(513, 48, generator=generator).to(triton_device)
    pool = SitePool(
        (torch.randn(3, 1, 16, 32, generator=generator) / 6).to(triton_device),
        (torch.randn(3, 16, 48, generator=generator) / 4).to(triton_device),
        (48,),
    )
    scales = np.ones(513, dtype=np.float32)
    pages = [(2,), (0, 1)]
    expected = y.clone()
    reference.add_lora(expected, x, pool, slots.tolist(), scales.tolist(), pages)
    mix = RoutedMix.build(slots, scales, [pages], 2, 2, torch.device(triton_device))
    assert mix.route.block_rows == 64
    TRITON.add_lora(y, x, pool, mix, 0)
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(y[70:100], expected[70:100])


def test_halves_give_the_bits_of_the_whole(
    step: str, triton_device: str, triton_dtype: torch.dtype, make_case: Any
) -> None:
    whole, halves = (make_case(step, triton_dtype, triton_device) for _ in range(2))
    mix = whole.routed()
    TRITON.add_lora(whole.y, whole.x, whole.pool, mix, 0)
    pool, plan = halves.pool, mix.plan_for(halves.pool.shape, halves.pool.a.dtype)
    h = shrink(halves.x, pool.a, mix, 0, plan)
    expand(halves.y, h, pool.b, pool.widths, mix, 0, plan, vectors=pool.vectors)
    assert torch.equal(whole.y.nan_to_num(7.0), halves.y.nan_to_num(7.0))


@pytest.mark.parametrize("step", ["vectors_of_some", "vectors_of_widths_not_a_multiple_of_16"])
def test_a_neighbour_with_vectors_changes_no_bit_of_others(
    step: str, triton_device: str, triton_dtype: torch.dtype, make_case: Any
) -> None:
    """The adapter itself is another with vectors and without; where nobody has some the option may be on."""
    results = []
    for options in ({"vectors": []}, {"vectors": [], "reads_vectors": [True]}, {}):
        case = make_case(step, triton_dtype, triton_device)
        TRITON.add_lora(case.y, case.x, case.pool, case.routed(**options), 0)
        results.append(case.y.nan_to_num(7.0))
    assert torch.equal(results[0], results[1])
    for t, slot in enumerate(case.slots):
        has_vectors = slot >= 0 and bool(case.vectors[slot])
        assert torch.equal(results[0][t], results[2][t]) != has_vectors


def test_a_mix_becomes_another_of_the_same_shapes(triton_device: str, make_case: Any, agrees: Any) -> None:
    case = make_case("33_rows_three_adapters", torch.float32, triton_device)
    expected = case.expected()
    captured = RoutedMix.build(
        np.full(33, -1, np.int32), np.ones(33, np.float32), [[]], 4, 3, torch.device(triton_device)
    )
    captured.copy_from(case.routed())
    TRITON.add_lora(case.y, case.x, case.pool, captured, 0)
    agrees(case.y, expected)
    with pytest.raises(ValueError, match="asked to copy one of 1 rows"):
        captured.copy_from(make_case("one_row", torch.float32, triton_device).routed())
