"""The activation without adapters: the reference's numbers, and the fused kernel's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from manylora_kernels import SitePool, reference
from manylora_kernels.lora import activation
from manylora_kernels.lora.routed import RoutedMix
from manylora_kernels.lora.triton_form import TRITON


def numbers(num_rows: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    y = 3 * torch.randn(num_rows, 2 * width, generator=generator)
    y[0, :4] = torch.tensor([-0.0, 0.0, -90.0, 90.0])
    return y.to(device, dtype)


@pytest.mark.parametrize(
    ("num_rows", "width"), [(1, 8), (33, 24), (3, 1027)], ids=["one_row", "33_rows", "two_tiles"]
)
def test_agrees_with_the_reference(
    num_rows: int, width: int, triton_dtype: torch.dtype, triton_device: str, agrees: Any
) -> None:
    y = numbers(num_rows, width, triton_dtype, triton_device)
    untouched = y.clone()
    wide = torch.full((num_rows, width + 24), torch.nan, dtype=triton_dtype, device=triton_device)
    activation.silu_mul(wide[:, :width], y)
    agrees(wide[:, :width], reference.silu_mul(y))
    assert wide[:, width:].isnan().all()
    assert torch.equal(y, untouched)


def test_a_base_row_has_the_same_bits_beside_adapters(
    triton_dtype: torch.dtype, triton_device: str, make_case: Any
) -> None:
    """Its answer must not tell whether a neighbour has an adapter."""
    width, k = 40, 32
    y = numbers(5, width, triton_dtype, triton_device)
    generator = torch.Generator().manual_seed(3)
    pool = SitePool(
        torch.randn(2, 2, 16, k, generator=generator).to(triton_device, triton_dtype),
        torch.randn(2, 16, 2 * width, generator=generator).to(triton_device, triton_dtype),
        (width, width),
    )
    x = torch.randn(5, k, generator=generator).to(triton_device, triton_dtype)
    slots, scales = np.array([-1, 0, -1, 1, -1], dtype=np.int32), np.zeros(5, dtype=np.float32)
    mix = RoutedMix.build(slots, scales + 2, [[(0,), (1,)]], 2, 1, torch.device(triton_device))
    beside = torch.full((5, width), torch.nan, dtype=triton_dtype, device=triton_device)
    TRITON.add_lora_silu_mul(beside, y, x, pool, mix, 0)
    alone = torch.full_like(beside, torch.nan)
    activation.silu_mul(alone, y)
    bits = {2: torch.int16, 4: torch.int32}[triton_dtype.itemsize]
    assert torch.equal(beside.view(bits)[[0, 2, 4]], alone.view(bits)[[0, 2, 4]])
    assert not torch.equal(beside[1], alone[1])
