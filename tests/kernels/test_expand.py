"""Expand against the reference, from an intermediate that is NaN wherever shrink leaves it undefined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from manylora_kernels import plan, reference
from manylora_kernels.expand import expand
from manylora_kernels.routed import RoutedMix


@pytest.mark.parametrize("num_splits", [1, 3])
def test_agrees_with_the_reference(
    step: str, num_splits: int, triton_dtype: torch.dtype, triton_device: str, make_case: Any, agrees: Any
) -> None:
    case = make_case(step, triton_dtype, triton_device)
    expected = case.expected()
    mix = RoutedMix.build(case.slots, case.scales, [case.pages], 4, 3, torch.device(triton_device))
    h = torch.full((num_splits, len(case.slots), len(case.pool.widths), 48), torch.nan, device=triton_device)
    position = 0
    for slot, mine in enumerate(case.pages):
        for t in (case.slots == slot).nonzero()[0].tolist():
            if mine:
                term = reference.shrink(case.x[t : t + 1], case.pool.a[list(mine)])[0]
                for split in range(num_splits):
                    h[split, position, :, : 16 * len(mine)] = term / num_splits
            position += 1
    chosen = replace(
        plan.choose(len(case.slots), case.pool.num_inputs, triton_dtype),
        block_outputs=32,
        num_splits=num_splits,
    )
    expand(case.y, h, case.pool.b, case.pool.widths, mix, 0, chosen)
    agrees(case.y, expected)
    beyond = case.y._base
    assert beyond is not None
    assert beyond[:, case.pool.num_outputs :].isnan().all(), "wrote past the end of a row"


def test_refuses_a_plan_for_other_blocks(triton_device: str, make_case: Any) -> None:
    case = make_case("one_row", torch.float32, triton_device)
    mix = RoutedMix.build(case.slots, case.scales, [case.pages], 4, 3, torch.device(triton_device))
    h = torch.zeros(1, 1, 1, 48, device=triton_device)
    with pytest.raises(ValueError, match="blocks of 64 rows, the route has 16"):
        expand(case.y, h, case.pool.b, case.pool.widths, mix, 0, plan.choose(1000, 32, torch.float32))
