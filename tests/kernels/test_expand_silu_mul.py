"""Expand with the activation behind it, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from manylora_kernels import reference
from manylora_kernels.lora.expand_silu_mul import expand_silu_mul
from manylora_kernels.lora.shrink import shrink
from manylora_kernels.lora.triton_form import TRITON


def with_base_rows(case: Any) -> torch.Tensor:
    """y with numbers in the rows that the other kernels must not touch: here every row is computed."""
    generator = torch.Generator().manual_seed(11)
    numbers = torch.randn(case.y.shape, generator=generator).to(case.y.device, case.y.dtype)
    return torch.where(case.y.isnan(), numbers, case.y)


def expected_of(case: Any, y: torch.Tensor) -> torch.Tensor:
    y = y.clone().float()
    case.change(y)
    return reference.silu_mul(y)


GATE_UP_STEPS = ["gate_and_up", "empty_segment", "vectors_of_gate_and_up"]


@pytest.mark.parametrize("step", GATE_UP_STEPS)
def test_agrees_with_the_reference(
    step: str, triton_dtype: torch.dtype, triton_device: str, make_case: Any, agrees: Any
) -> None:
    case = make_case(step, triton_dtype, triton_device)
    y = with_base_rows(case)
    untouched = y.clone()
    out = torch.full((len(y), case.pool.widths[0]), torch.nan, dtype=triton_dtype, device=triton_device)
    TRITON.add_lora_silu_mul(out, y, case.x, case.pool, case.routed(), 0)
    agrees(out, expected_of(case, y))
    assert torch.equal(y, untouched)


def test_a_neighbour_with_vectors_changes_no_bit_of_others(
    triton_device: str, triton_dtype: torch.dtype, make_case: Any
) -> None:
    """Neither of rows of the base, nor of an adapter without."""
    results = []
    for options in ({"vectors": []}, {}):
        case = make_case("vectors_of_gate_and_up", triton_dtype, triton_device)
        y = with_base_rows(case)
        out = torch.full((len(y), case.pool.widths[0]), torch.nan, dtype=triton_dtype, device=triton_device)
        TRITON.add_lora_silu_mul(out, y, case.x, case.pool, case.routed(**options), 0)
        results.append(out)
    for t, slot in enumerate(case.slots):
        has_vectors = slot >= 0 and bool(case.vectors[slot])
        assert torch.equal(results[0][t], results[1][t]) != has_vectors


def test_takes_a_shrink_that_ran_by_itself(triton_device: str, make_case: Any, agrees: Any) -> None:
    case = make_case("gate_and_up", torch.float32, triton_device)
    y, mix = with_base_rows(case), case.routed()
    out = torch.full((len(y), case.pool.widths[0]), torch.nan, device=triton_device)
    plan = mix.plan_for(case.pool.shape, case.pool.a.dtype)
    h = shrink(case.x, case.pool.a, mix, 0, plan)
    expand_silu_mul(out, y, h, case.pool.b, mix, 0, plan)
    agrees(out, expected_of(case, y))


def test_writes_nothing_past_the_end_of_a_row(triton_device: str, make_case: Any) -> None:
    case = make_case("gate_and_up", torch.float32, triton_device)
    y, mix = with_base_rows(case), case.routed()
    wide = torch.full((len(y), 40 + 24), torch.nan, device=triton_device)
    TRITON.add_lora_silu_mul(wide[:, :40], y, case.x, case.pool, mix, 0)
    assert not wide[:, :40].isnan().any()
    assert wide[:, 40:].isnan().all()


def test_large_gates_do_not_overflow(triton_device: str, make_case: Any) -> None:
    case = make_case("gate_and_up", torch.float32, triton_device)
    y = with_base_rows(case)
    y[2, :40] = torch.linspace(-200.0, 200.0, 40, device=triton_device)
    out = torch.full((len(y), 40), torch.nan, device=triton_device)
    TRITON.add_lora_silu_mul(out, y, case.x, case.pool, case.routed(), 0)
    torch.testing.assert_close(out[2], reference.silu_mul(y[2:3])[0], rtol=2e-5, atol=2e-5)


def test_refuses_a_plan_for_other_blocks(triton_device: str, make_case: Any) -> None:
    case = make_case("gate_and_up", torch.float32, triton_device)
    mix = case.routed()
    other = replace(mix.plan_for(case.pool.shape, torch.float32), block_rows=64)
    with pytest.raises(ValueError, match="blocks of 64 rows, the route has 16"):
        expand_silu_mul(case.y[:, :40], case.y, torch.zeros(1, 4, 2, 48), case.pool.b, mix, 0, other)
