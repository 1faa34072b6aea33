"""Shrink against the reference, row by row through the route."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from manylora_kernels import reference
from manylora_kernels.lora.shrink import shrink


@pytest.mark.parametrize(("num_splits", "pages"), [(1, 2), (4, 4)])
def test_agrees_with_the_reference(
    step: str,
    num_splits: int,
    pages: int,
    triton_dtype: torch.dtype,
    triton_device: str,
    make_case: Any,
    agrees: Any,
) -> None:
    case = make_case(step, triton_dtype, triton_device)
    mix = case.routed()
    chosen = mix.plan_for(case.pool.shape, triton_dtype)
    tile = replace(chosen.shrink, width=16, pages=pages)
    h = shrink(case.x, case.pool.a, mix, 0, replace(chosen, num_splits=num_splits, shrink=tile))
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
    mix = case.routed()
    other = replace(mix.plan_for(case.pool.shape, torch.float32), block_rows=64)
    with pytest.raises(ValueError, match="blocks of 64 rows, the route has 16"):
        shrink(case.x, case.pool.a, mix, 0, other)
