"""Shrink against the reference, row by row through the route."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from manylora_kernels import plan, reference
from manylora_kernels.routed import RoutedMix
from manylora_kernels.shrink import shrink


@pytest.mark.parametrize("num_splits", [1, 3])
def test_agrees_with_the_reference(
    step: str, num_splits: int, triton_dtype: torch.dtype, triton_device: str, make_case: Any, agrees: Any
) -> None:
    case = make_case(step, triton_dtype, triton_device)
    mix = RoutedMix.build(case.slots, case.scales, [case.pages], 4, 3, torch.device(triton_device))
    chosen = replace(
        plan.choose(len(case.slots), case.pool.num_inputs, triton_dtype),
        block_inputs=16,
        num_splits=num_splits,
    )
    h = shrink(case.x, case.pool.a, mix, 0, chosen)
    assert h.shape == (num_splits, len(case.slots), len(case.pool.widths), 48)
    position = 0
    for slot, mine in enumerate(case.pages):
        for t in (case.slots == slot).nonzero()[0].tolist():
            if mine:
                expected = reference.shrink(case.x[t : t + 1], case.pool.a[list(mine)])[0]
                agrees(h[:, position, :, : 16 * len(mine)].sum(0).to(triton_dtype), expected)
            position += 1


def test_refuses_a_plan_for_other_blocks(triton_device: str, make_case: Any) -> None:
    case = make_case("one_row", torch.float32, triton_device)
    mix = RoutedMix.build(case.slots, case.scales, [case.pages], 4, 3, torch.device(triton_device))
    with pytest.raises(ValueError, match="blocks of 64 rows, the route has 16"):
        shrink(case.x, case.pool.a, mix, 0, plan.choose(1000, 32, torch.float32))
