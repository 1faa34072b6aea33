"""Queries, keys and values in the layout that the attention kernels read, whatever the model's own is.

Shape key: H heads, T rows, D head size.

A model passes a view of a projection [T, H * D], or the output of its rotary embedding: rows first or
heads first in memory, and with T or H of 1 the stride of that dimension may be anything. A kernel that was
compiled for strides and addresses that 16 divides is compiled again where 16 does not. So strides go to the
kernels in units that follow from D alone, and addresses are multiples of 16 bytes.
"""

from __future__ import annotations

import math

import torch

_ALIGNMENT_BYTES = 16


def stride_unit(size: int) -> int:
    """What divides all strides of rows of heads of this size, up to 16, in elements."""
    return math.gcd(size, 16)


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor begins where a kernel may read 128 bits at once."""
    return tensor.data_ptr() % _ALIGNMENT_BYTES == 0


def head_rows(heads: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself where kernels can read it, else a contiguous copy.

    Args:
        heads: [H, T, D], any strides.

    Returns:
        [H, T, D] with a last stride of 1, other strides that `stride_unit(D)` divides, and an aligned start.
    """
    unit = stride_unit(heads.shape[2])
    num_heads, num_rows, _ = heads.shape
    fits = (
        heads.stride(2) == 1
        and (num_heads == 1 or heads.stride(0) % unit == 0)
        and (num_rows == 1 or heads.stride(1) % unit == 0)
        and is_aligned(heads)
    )
    # Not contiguous(), which returns a contiguous tensor as it is, wherever it starts.
    return heads if fits else heads.clone(memory_format=torch.contiguous_format)


def head_strides(heads: torch.Tensor) -> tuple[int, int]:
    """Units from head to head and from row to row; 0 where there is one only, which may claim any.

    Args:
        heads: [H, T, D], from `head_rows`.
    """
    unit = stride_unit(heads.shape[2])
    num_heads, num_rows, _ = heads.shape
    return (
        heads.stride(0) // unit if num_heads > 1 else 0,
        heads.stride(1) // unit if num_rows > 1 else 0,
    )
