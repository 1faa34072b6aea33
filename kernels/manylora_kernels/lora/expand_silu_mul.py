"""Expand of a gate/up site together with the activation behind it.

Shape key: T rows, G' blocks of all rows, S = 2 linears of N outputs each, Z splits.

Behind a gate/up site a model computes `silu(gate) * up`. Two thirds of what an unfused prefill step moves for
its adapters is gate and up, read and written once more; here they are read once and only the product is
written. All rows take part, so rows without an adapter have blocks of their own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from manylora_kernels.lora.activation import silu_times
from manylora_kernels.lora.plan import Plan, Tile
from manylora_kernels.lora.pool import Vectors
from manylora_kernels.lora.routed import RoutedMix, row_stride
from manylora_kernels.lora.tile import block_rows, lora_term, slot_pages
from manylora_kernels.lora.vectors import apply_vectors, vector_arguments


def expand_silu_mul(
    out: torch.Tensor,
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    mix: RoutedMix,
    kind: int,
    plan: Plan,
    chained: bool = False,
    vectors: Vectors | None = None,
) -> None:
    """Add the adapters' term to gate and up and multiply: `out = silu(gate + lora_gate) * (up + lora_up)`.

    `gate, up = y[:, :N], y[:, N:]`; the terms are expand's, zero for rows without an adapter, and so are
    vectors, which come before the activation. Sums and activation are in float32 and rounded once.

    Args:
        out: [T, N], columns contiguous; every row is written.
        y: [T, 2 * N], columns contiguous; only read.
        h: [Z, T, 2, R], float32, from shrink.
        b: [P, 16, 2 * N], pages contiguous.
        mix: the step's route, pages and scales.
        kind: the kind of the site.
        plan: tile sizes; its block_rows are the route's.
        chained: whether shrink was the very last launch on the stream and was itself chained.
        vectors: of the pool: [V, 2 * N] each.

    Raises:
        ValueError: a plan for other blocks than the route's.
    """
    mix.check_plan(plan)
    width, tile = out.shape[1], halved(plan.expand)
    _expand_silu_mul_kernel[(-(-width // tile.width), mix.route.max_blocks_of_all)](
        out_ptr=out,
        y_ptr=y,
        h_ptr=h,
        b_ptr=b,
        route_ptr=mix.route.packed,
        table_ptr=mix.tables[kind],
        scales_ptr=mix.scales,
        num_rows=h.shape[1],
        stride_ot=row_stride(out),
        stride_yt=row_stride(y),
        stride_bp=b.stride(0),
        **vector_arguments(vectors, mix, kind),
        WIDTH=width,
        NUM_SPLITS=h.shape[0],
        MAX_PAGES=mix.max_pages,
        BLOCK_T=plan.block_rows,
        BLOCK_N=tile.width,
        PAGES=tile.pages,
        CHAINED=chained,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"launch_pdl": True} if chained else {}),
    )


def halved(tile: Tile) -> Tile:
    """The tile for two sums at once: half as wide, so that they take the registers of one."""
    return replace(tile, width=tile.width // 2, num_warps=max(4, tile.num_warps // 2))


@triton.jit(
    do_not_specialize=["num_rows"],
    # Parts of an upload, whose alignment changes with T.
    do_not_specialize_on_alignment=["table_ptr", "scales_ptr", "vectors_ptr"],
)
def _expand_silu_mul_kernel(
    out_ptr,
    y_ptr,
    h_ptr,
    b_ptr,
    route_ptr,
    table_ptr,
    scales_ptr,
    num_rows,
    stride_ot,
    stride_yt,
    stride_bp,
    vectors_ptr,
    vector_scale_ptr,
    vector_offset_ptr,
    WIDTH: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
    CHAINED: tl.constexpr,
    READS_VECTORS: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N
    block = tl.program_id(1).to(tl.int64)
    block_ptr = route_ptr + num_rows + 4 * block
    rows = tl.load(block_ptr + 2)
    if rows == 0:
        return
    slot = tl.load(block_ptr).to(tl.int64)
    num_pages, pages_ptr = slot_pages(table_ptr, slot, MAX_PAGES)
    start, mask_t, row = block_rows(route_ptr, block_ptr, rows, BLOCK_T)

    offs_n = column + tl.arange(0, BLOCK_N)
    mask_n = offs_n < WIDTH
    mask_y = mask_t[:, None] & mask_n[None, :]
    scale = tl.load(scales_ptr + row, mask=mask_t, other=0.0)
    y_ptrs = y_ptr + (row * stride_yt)[:, None] + offs_n[None, :]
    gate = tl.load(y_ptrs, mask=mask_y, other=0.0)
    up = tl.load(y_ptrs + WIDTH, mask=mask_y, other=0.0)
    gate_term = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    up_term = gate_term
    if num_pages > 0:
        gate_term = lora_term(
            h_ptr, b_ptr, pages_ptr, num_pages, num_rows, start, mask_t, 0, offs_n, mask_n, stride_bp,
            (WIDTH, WIDTH), NUM_SPLITS, MAX_PAGES, BLOCK_T, BLOCK_N, PAGES, CHAINED,
        )  # fmt: skip
        up_term = lora_term(
            h_ptr, b_ptr + WIDTH, pages_ptr, num_pages, num_rows, start, mask_t, 1, offs_n, mask_n, stride_bp,
            (WIDTH, WIDTH), NUM_SPLITS, MAX_PAGES, BLOCK_T, BLOCK_N, PAGES, False,
        )  # fmt: skip

    gate = gate.to(tl.float32) + gate_term * scale[:, None]
    up = up.to(tl.float32) + up_term * scale[:, None]
    if READS_VECTORS:
        vector = tl.load(vectors_ptr + slot, mask=slot >= 0, other=-1).to(tl.int64)
        if vector >= 0:
            begin = vector * (2 * WIDTH)
            gate = apply_vectors(gate, vector_scale_ptr, vector_offset_ptr, begin, offs_n, mask_n)
            up = apply_vectors(up, vector_scale_ptr, vector_offset_ptr, begin + WIDTH, offs_n, mask_n)
    out = silu_times(gate, up)
    out_ptrs = out_ptr + (row * stride_ot)[:, None] + offs_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_y)
