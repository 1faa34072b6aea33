"""Keys and values of a step land in their rows of the cache, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from manylora_kernels.attention.cache_write import write_cache


@pytest.mark.parametrize(
    ("num_rows", "num_kv", "key_size", "value_size"),
    [(1, 2, 64, 64), (33, 1, 16, 16), (9, 3, 80, 48), (5, 2, 20, 72)],
    ids=["one_row", "33_rows", "size_80", "larger_values"],
)
def test_each_token_is_written_to_its_row(
    num_rows: int,
    num_kv: int,
    key_size: int,
    value_size: int,
    triton_dtype: torch.dtype,
    triton_device: str,
) -> None:
    generator = torch.Generator().manual_seed(2)
    # As transformers hands it over: rows first in memory, heads first in shape.
    k = torch.randn(num_rows, num_kv, key_size, generator=generator).to(triton_device, triton_dtype)
    v = torch.randn(num_rows, num_kv, value_size, generator=generator).to(triton_device, triton_dtype)
    rows = torch.randperm(50, generator=generator)[:num_rows].int().to(triton_device)
    keys = torch.full((50, num_kv * key_size), torch.nan, dtype=triton_dtype, device=triton_device)
    values = torch.full((50, num_kv * value_size), torch.nan, dtype=triton_dtype, device=triton_device)
    expected_keys = keys.index_copy(0, rows.long(), k.flatten(1))
    expected_values = values.index_copy(0, rows.long(), v.flatten(1))
    write_cache(keys, values, k.transpose(0, 1), v.transpose(0, 1), rows)
    torch.testing.assert_close(keys, expected_keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [16, 20, 5])
def test_takes_keys_and_values_in_any_layout(size: int, triton_device: str) -> None:
    """Heads first, part of a projection, from an odd address, transposed."""
    new = torch.arange(3 * 4 * size, dtype=torch.float32, device=triton_device).view(3, 4, size)
    wide = torch.full((3, 5, size + 2), torch.nan, device=triton_device)
    wide[:, 1:, 1:-1] = new
    rows = torch.tensor([5, 0, 7], dtype=torch.int32, device=triton_device)
    for heads in (
        new.transpose(0, 1),
        new.transpose(0, 1).contiguous(),
        wide[:, 1:, 1:-1].transpose(0, 1),
        new.permute(2, 0, 1).contiguous().permute(2, 1, 0),
    ):
        keys, values = torch.zeros(2, 8, 4 * size, device=triton_device)
        write_cache(keys, values, heads, heads, rows)
        assert torch.equal(keys[rows.long()], new.flatten(1))
        assert torch.equal(values, keys)
        assert not keys[[1, 2, 3, 4, 6]].any()


def test_a_row_below_0_is_not_written(triton_device: str) -> None:
    keys = torch.zeros(4, 16, device=triton_device)
    values = torch.zeros(4, 16, device=triton_device)
    new = torch.ones(1, 3, 16, device=triton_device)
    rows = torch.tensor([2, -1, 0], dtype=torch.int32, device=triton_device)
    write_cache(keys, values, new, new, rows)
    assert keys.sum(1).tolist() == values.sum(1).tolist() == [16.0, 0.0, 16.0, 0.0]
