"""Long steps of a single adapter, on the vendor's matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from manylora_kernels import SitePool, reference
from manylora_kernels.device import INTERPRETER
from manylora_kernels.lora import planner
from manylora_kernels.lora.one_adapter import OneAdapter
from manylora_kernels.lora.routed import RoutedMix
from manylora_kernels.lora.triton_form import TRITON

LEAST = planner.one_adapter_rows(INTERPRETER)


def of(slots: list[int], scales: Any = 1.0, pages: Any = (((0,), (1, 2)),)) -> OneAdapter | None:
    row_scales = np.broadcast_to(np.float32(scales), len(slots))
    return OneAdapter.of(np.array(slots, dtype=np.int32), row_scales, pages, 4, torch.device("cpu"))


def test_is_chosen_for_one_run_of_one_adapter() -> None:
    found = of([-1, 1, 1, 1, 1, -1], pages=[[(0,), (1, 2)], [(3,), ()]])
    assert found is not None
    assert found.rows == slice(1, 5)
    assert found.pages[0] is not None
    assert found.pages[0].tolist() == [1, 2]
    assert found.pages[1] is None


@pytest.mark.parametrize(
    ("slots", "scales"),
    [
        ([-1] * 8, 1.0),
        ([1, 1, 1, -1, -1, -1], 1.0),
        ([1, 1, 1, 1, 0], 1.0),
        ([1, 1, -1, 1, 1], 1.0),
        ([1, 1, 1, 1], [1.0, 1.0, 2.0, 1.0]),
    ],
    ids=["no_adapter", "few_rows", "two_adapters", "two_runs", "two_scales"],
)
def test_is_not_chosen_for(slots: list[int], scales: Any) -> None:
    assert of(slots, scales) is None


def long_step(device: str, dtype: torch.dtype) -> tuple[SitePool, torch.Tensor, torch.Tensor, Any, Any]:
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    pool = SitePool(
        randn(4, 2, 16, 40) / 6, randn(4, 16, 36) / 4, (24, 12), 1 + randn(3, 36) / 4, randn(3, 36)
    )
    num_rows = LEAST + 5
    slots = np.array([-1] * 2 + [1] * LEAST + [-1] * 3, dtype=np.int32)
    x, y = randn(num_rows, 40), randn(num_rows, 36)
    x[slots < 0], y[slots < 0] = torch.nan, torch.nan
    return pool, x, y, slots, np.full(num_rows, 0.5, dtype=np.float32)


def test_agrees_with_the_reference(triton_device: str, triton_dtype: torch.dtype, agrees: Any) -> None:
    pool, x, y, slots, scales = long_step(triton_device, triton_dtype)
    pages = [(0,), (3, 1)]
    expected = y.float()
    reference.add_lora(expected, x, pool, slots.tolist(), scales.tolist(), pages)
    mix = RoutedMix.build(slots, scales, [pages, [(), ()]], 2, 2, torch.device(triton_device))
    assert mix.one_adapter is not None
    untouched = y.clone()
    TRITON.add_lora(y, x, pool, mix, 1)
    assert torch.equal(y.nan_to_num(7.0), untouched.nan_to_num(7.0)), "no pages in this kind"
    TRITON.add_lora(y, x, pool, mix, 0)
    agrees(y, expected)


def test_vectors_agree_with_the_reference(triton_device: str, triton_dtype: torch.dtype, agrees: Any) -> None:
    """In the first kind beside pages, in the second alone, in the third none."""
    pool, x, y, slots, scales = long_step(triton_device, triton_dtype)
    pages = [[(0,), (3, 1)], [(), ()], [(0,), (3, 1)]]
    vectors = [[(), (2,)], [(), (1,)], [(), ()]]
    mix = RoutedMix.build(slots, scales, pages, 2, 2, torch.device(triton_device), vectors=vectors)
    assert mix.one_adapter is not None
    assert mix.reads_vectors == (True, True, False)
    for kind in range(3):
        found, expected = y.clone(), y.float()
        reference.add_lora(expected, x, pool, slots.tolist(), scales.tolist(), pages[kind], vectors[kind])
        TRITON.add_lora(found, x, pool, mix, kind)
        agrees(found, expected)


def test_leaves_a_pool_of_another_dtype_to_the_kernels() -> None:
    pool, x, y, slots, scales = long_step("cpu", torch.float32)
    mix = RoutedMix.build(slots, scales, [[(0,), (3, 1)]], 2, 2, torch.device("cpu"))
    assert mix.one_adapter is not None
    assert mix.one_adapter.serves(y, x, pool)
    assert not mix.one_adapter.serves(y, x, SitePool(pool.a.half(), pool.b.half(), pool.widths))
