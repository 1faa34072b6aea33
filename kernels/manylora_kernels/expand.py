"""The second product of all linears of a site: add the term of each row's adapter to y.

Shape key: T rows, G blocks, P' most pages of an adapter, S linears, N outputs of all S, R = 16 * P' rank
rows, Z splits.

One launch for the site. A program updates one tile of columns, which lies in one linear, for one block of
rows. It adds up the Z parts of h in a fixed order and reads and writes its part of y once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from manylora_kernels.plan import Plan
from manylora_kernels.routed import RoutedMix


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    widths: tuple[int, ...],
    mix: RoutedMix,
    kind: int,
    plan: Plan,
) -> None:
    """Multiply by B and add in place: `y[order[i], s] += scale[order[i]] * (sum over z of h[z, i, s]) B_s^T`.

    Args:
        y: [T, N], columns contiguous. Rows without an adapter are neither read nor written.
        h: [Z, T, S, R], float32, from shrink.
        b: [P, 16, N], pages contiguous.
        widths: outputs of each of the S linears.
        mix: the step's route, pages and scales.
        kind: the kind of the site.
        plan: tile sizes; its block_rows are the route's.

    Raises:
        ValueError: a plan for other blocks than the route's.
    """
    if plan.block_rows != mix.route.block_rows:
        raise ValueError(f"plan for blocks of {plan.block_rows} rows, the route has {mix.route.block_rows}")
    tiles = _tiles(widths, plan.block_outputs, y.device)
    _expand_kernel[(tiles.shape[1], mix.route.max_blocks)](
        y_ptr=y,
        h_ptr=h,
        b_ptr=b,
        order_ptr=mix.route.order,
        blocks_ptr=mix.route.blocks,
        counts_ptr=mix.counts[kind],
        table_ptr=mix.tables[kind],
        scales_ptr=mix.scales,
        tiles_ptr=tiles,
        num_rows=h.shape[1],
        max_blocks=mix.route.max_blocks,
        max_pages=mix.max_pages,
        num_splits=h.shape[0],
        num_tiles=tiles.shape[1],
        num_linears=h.shape[2],
        num_outputs=b.shape[2],
        stride_yt=y.stride(0),
        stride_bp=b.stride(0),
        BLOCK_T=plan.block_rows,
        BLOCK_N=plan.block_outputs,
        COLUMNS_ALIGNED=all(width % 16 == 0 for width in widths),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


@functools.lru_cache(maxsize=64)
def _tiles(widths: tuple[int, ...], block_outputs: int, device: torch.device) -> torch.Tensor:
    """Cut the columns of each linear into tiles: [3, tiles], int32, the linear, first column and end of
    each."""
    rows = []
    begin = 0
    for s, width in enumerate(widths):
        for column in range(begin, begin + width, block_outputs):
            rows.append((s, column, begin + width))
        begin += width
    return torch.tensor(rows, dtype=torch.int32).t().contiguous().to(device)


@triton.jit(
    do_not_specialize=["num_rows", "max_blocks"],
    # Parts of one upload, whose alignment changes with T.
    do_not_specialize_on_alignment=["counts_ptr", "table_ptr", "scales_ptr"],
)
def _expand_kernel(
    y_ptr,
    h_ptr,
    b_ptr,
    order_ptr,
    blocks_ptr,
    counts_ptr,
    table_ptr,
    scales_ptr,
    tiles_ptr,
    num_rows,
    max_blocks,
    max_pages,
    num_splits,
    num_tiles,
    num_linears,
    num_outputs,
    stride_yt,
    stride_bp,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS_ALIGNED: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    rows = tl.load(blocks_ptr + 2 * max_blocks + block)
    if rows == 0:
        return
    slot = tl.load(blocks_ptr + block).to(tl.int64)
    num_pages = tl.load(counts_ptr + slot)
    if num_pages == 0:
        return
    start = tl.load(blocks_ptr + max_blocks + block).to(tl.int64)
    linear = tl.load(tiles_ptr + tile).to(tl.int64)
    column = tl.load(tiles_ptr + num_tiles + tile)
    column_end = tl.load(tiles_ptr + 2 * num_tiles + tile)
    if COLUMNS_ALIGNED:
        # The compiler knows nothing of what is loaded, and would move single elements.
        column = tl.multiple_of(column, 16)
        column_end = tl.multiple_of(column_end, 16)

    offs_t = tl.arange(0, BLOCK_T)
    offs_r = tl.arange(0, 16)
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_t = offs_t < rows
    mask_n = offs_n < column_end
    row = tl.load(order_ptr + start + offs_t, mask=mask_t, other=0).to(tl.int64)
    mask_y = mask_t[:, None] & mask_n[None, :]

    num_ranks = max_pages * 16
    position = (start + offs_t.to(tl.int64)) * num_linears + linear
    h_ptrs = h_ptr + position[:, None] * num_ranks + offs_r[None, :]
    stride_hz = num_rows.to(tl.int64) * num_linears * num_ranks
    acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for nth_page in range(num_pages):
        page = tl.load(table_ptr + slot * max_pages + nth_page).to(tl.int64)
        b_ptrs = b_ptr + page * stride_bp + offs_r[:, None].to(tl.int64) * num_outputs + offs_n[None, :]
        b = tl.load(b_ptrs, mask=mask_n[None, :], other=0.0)
        h = tl.zeros([BLOCK_T, 16], dtype=tl.float32)
        for split in range(num_splits):
            h += tl.load(h_ptrs + split * stride_hz + nth_page * 16, mask=mask_t[:, None], other=0.0)
        acc = tl.dot(h.to(b.dtype), b, acc=acc, input_precision="ieee")

    scale = tl.load(scales_ptr + row, mask=mask_t, other=0.0)
    y_ptrs = y_ptr + row[:, None] * stride_yt + offs_n[None, :]
    y = tl.load(y_ptrs, mask=mask_y, other=0.0).to(tl.float32) + acc * scale[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_y)
