"""Write the keys and values of a step's tokens into the blocked cache, both in one launch.

Shape key: T tokens, V key/value heads, D key size, E value size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora_kernels.attention.head_rows import head_rows, head_strides, stride_unit

_BLOCK_TOKENS = 8


def write_cache(
    keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor
) -> None:
    """`keys[rows[t], h] = k[h, t]` and `values[rows[t], h] = v[h, t]`; tokens whose row is below 0 are left
    out.

    Args:
        keys: [cache rows, V * D], contiguous.
        values: [cache rows, V * E], contiguous.
        k: [V, T, D], best as `head_rows` makes it; else it is copied.
        v: [V, T, E], likewise.
        rows: [T], int32, no row twice.
    """
    num_kv, num_rows, key_size = k.shape
    value_size = v.shape[2]
    k, v = head_rows(k), head_rows(v)
    (stride_kh, stride_kt), (stride_vh, stride_vt) = head_strides(k), head_strides(v)
    _write_cache_kernel[(triton.cdiv(num_rows, _BLOCK_TOKENS), num_kv)](
        keys_ptr=keys,
        values_ptr=values,
        k_ptr=k,
        v_ptr=v,
        rows_ptr=rows,
        num_rows=num_rows,
        stride_kr=keys.stride(0),
        stride_vr=values.stride(0),
        stride_kh=stride_kh,
        stride_kt=stride_kt,
        stride_vh=stride_vh,
        stride_vt=stride_vt,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        KEY_UNIT=stride_unit(key_size),
        VALUE_UNIT=stride_unit(value_size),
        BLOCK_T=_BLOCK_TOKENS,
        BLOCK_D=triton.next_power_of_2(key_size),
        BLOCK_E=triton.next_power_of_2(value_size),
        num_warps=4,
    )


@triton.jit(
    # The strides of k and v are counted in units, so that what divides them is known whatever they are.
    do_not_specialize=["num_rows", "stride_kh", "stride_kt", "stride_vh", "stride_vt"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def _write_cache_kernel(
    keys_ptr,
    values_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    num_rows,
    stride_kr,
    stride_vr,
    stride_kh,
    stride_kt,
    stride_vh,
    stride_vt,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    kv = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    row = tl.load(rows_ptr + offs_t, mask=offs_t < num_rows, other=-1).to(tl.int64)
    mask_k = (row >= 0)[:, None] & (offs_d < KEY_SIZE)[None, :]
    mask_v = (row >= 0)[:, None] & (offs_e < VALUE_SIZE)[None, :]
    k_ptrs = k_ptr + kv * (stride_kh * KEY_UNIT) + offs_t[:, None] * (stride_kt * KEY_UNIT)
    v_ptrs = v_ptr + kv * (stride_vh * VALUE_UNIT) + offs_t[:, None] * (stride_vt * VALUE_UNIT)
    k = tl.load(k_ptrs + offs_d[None, :], mask=mask_k)
    v = tl.load(v_ptrs + offs_e[None, :], mask=mask_v)
    tl.store(keys_ptr + row[:, None] * stride_kr + kv * KEY_SIZE + offs_d[None, :], k, mask=mask_k)
    tl.store(values_ptr + row[:, None] * stride_vr + kv * VALUE_SIZE + offs_e[None, :], v, mask=mask_v)
