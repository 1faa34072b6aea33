"""The activation behind a gate/up site, for steps without adapters there.

Shape key: T rows, N outputs of each of gate and up.

A row gets the same bits as a row without an adapter gets from `expand_silu_mul`, so that the bits of a
row of the base model do not depend on whether its neighbours have adapters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora_kernels.lora.routed import row_stride

_BLOCK_N = 1024
"""Eight 16-bit elements of gate and of up for each thread: one load of 128 bits each."""


def silu_mul(out: torch.Tensor, y: torch.Tensor) -> None:
    """Compute `out = silu(gate) * up` with `gate, up = y[:, :N], y[:, N:]`, in float32, rounded once.

    Args:
        out: [T, N], columns contiguous; every row is written.
        y: [T, 2 * N], columns contiguous.
    """
    num_rows, width = out.shape
    # Rows are the first dimension of the grid, which alone may be longer than 65,535.
    _silu_mul_kernel[(num_rows, triton.cdiv(width, _BLOCK_N))](
        out_ptr=out,
        y_ptr=y,
        stride_ot=row_stride(out),
        stride_yt=row_stride(y),
        WIDTH=width,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
    )


@triton.jit
def _silu_mul_kernel(out_ptr, y_ptr, stride_ot, stride_yt, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < WIDTH
    y_ptrs = y_ptr + row * stride_yt + offs_n
    # A term of zero, as a row without an adapter has: it makes a zero of a negative zero.
    gate = tl.load(y_ptrs, mask=mask_n, other=0.0).to(tl.float32) + 0.0
    up = tl.load(y_ptrs + WIDTH, mask=mask_n, other=0.0).to(tl.float32) + 0.0
    out = silu_times(gate, up)
    tl.store(out_ptr + row * stride_ot + offs_n, out.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def silu_times(gate, up):
    """`silu(gate) * up` of float32 numbers."""
    # The sigmoid from the side that cannot overflow.
    shrunk = tl.exp(-tl.abs(gate))
    return gate * tl.where(gate >= 0, 1.0, shrunk) / (1.0 + shrunk) * up
