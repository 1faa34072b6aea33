"""Expand against the reference, from an intermediate that is NaN wherever shrink leaves it undefined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from manylora_kernels import reference
from manylora_kernels.lora.expand import expand


def intermediate(case: Any, num_splits: int) -> torch.Tensor:
    """What shrink would give, from the reference; NaN wherever shrink leaves it undefined."""
    shape = (num_splits, len(case.slots), len(case.pool.widths), 48)
    h = torch.full(shape, torch.nan, device=case.x.device)
    position = 0
    for slot, mine in enumerate(case.pages):
        for t in (case.slots == slot).nonzero()[0].tolist():
            if mine:
                term = reference.shrink(case.x[t : t + 1], case.pool.a[list(mine)])[0]
                h[:, position, :, : 16 * len(mine)] = term / num_splits
            position += 1
    return h


@pytest.mark.parametrize(("num_splits", "pages"), [(1, 1), (3, 2)])
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
    expected = case.expected()
    mix = case.routed()
    chosen = mix.plan_for(case.pool.shape, triton_dtype)
    chosen = replace(chosen, num_splits=num_splits, expand=replace(chosen.expand, width=32, pages=pages))
    h = intermediate(case, num_splits)
    expand(case.y, h, case.pool.b, case.pool.widths, mix, 0, chosen, vectors=case.pool.vectors)
    agrees(case.y, expected)
    beyond = case.y._base
    assert beyond is not None
    assert beyond[:, case.pool.num_outputs :].isnan().all(), "wrote past the end of a row"


def test_refuses_a_plan_for_other_blocks(triton_device: str, make_case: Any) -> None:
    case = make_case("one_row", torch.float32, triton_device)
    mix = case.routed()
    h = torch.zeros(1, 1, 1, 48, device=triton_device)
    other = replace(mix.plan_for(case.pool.shape, torch.float32), block_rows=64)
    with pytest.raises(ValueError, match="blocks of 64 rows, the route has 16"):
        expand(case.y, h, case.pool.b, case.pool.widths, mix, 0, other)
