"""The second product of all linears of a site: add the term of each row's adapter to y.

Shape key: T rows, G blocks, P' most pages of an adapter, S linears, N outputs of all S, R = 16 * P' rank
rows, Z splits, V pages of vectors.

One launch for the site. A program updates one tile of columns, which lies in one linear, for one block of
rows. It adds up the Z parts of h in a fixed order and reads and writes its part of y once. Launched right
behind shrink it starts early and has B and y in registers when h is complete.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora_kernels.lora.plan import Plan
from manylora_kernels.lora.pool import Vectors
from manylora_kernels.lora.routed import RoutedMix, row_stride
from manylora_kernels.lora.tile import block_rows, lora_term, num_outputs, slot_pages
from manylora_kernels.lora.vectors import apply_vectors, vector_arguments


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    widths: tuple[int, ...],
    mix: RoutedMix,
    kind: int,
    plan: Plan,
    chained: bool = False,
    vectors: Vectors | None = None,
) -> None:
    """Multiply by B and add in place: `y[order[i], s] += scale[order[i]] * (sum over z of h[z, i, s]) B_s^T`.

    In a step that reads vectors in this kind, rows whose adapter has some become `y * scale_v + offset_v`
    after that, before they are rounded; others get the same bits as without.

    Args:
        y: [T, N], columns contiguous. Rows without an adapter are neither read nor written.
        h: [Z, T, S, R], float32, from shrink.
        b: [P, 16, N], pages contiguous.
        widths: outputs of each of the S linears.
        mix: the step's route, pages and scales.
        kind: the kind of the site.
        plan: tile sizes; its block_rows are the route's.
        chained: whether shrink was the very last launch on the stream and was itself chained.
        vectors: of the pool: [V, N] each.

    Raises:
        ValueError: a plan for other blocks than the route's.
    """
    mix.check_plan(plan)
    num_tiles = sum(-(-width // plan.expand.width) for width in widths)
    _expand_kernel[(num_tiles, mix.route.max_blocks)](
        y_ptr=y,
        h_ptr=h,
        b_ptr=b,
        route_ptr=mix.route.packed,
        table_ptr=mix.tables[kind],
        scales_ptr=mix.scales,
        num_rows=h.shape[1],
        stride_yt=row_stride(y),
        stride_bp=b.stride(0),
        **vector_arguments(vectors, mix, kind),
        WIDTHS=widths,
        NUM_SPLITS=h.shape[0],
        MAX_PAGES=mix.max_pages,
        BLOCK_T=plan.block_rows,
        BLOCK_N=plan.expand.width,
        PAGES=plan.expand.pages,
        CHAINED=chained,
        num_warps=plan.expand.num_warps,
        num_stages=plan.expand.num_stages,
        **({"launch_pdl": True} if chained else {}),
    )


@triton.jit(
    do_not_specialize=["num_rows"],
    # Parts of an upload, whose alignment changes with T.
    do_not_specialize_on_alignment=["table_ptr", "scales_ptr", "vectors_ptr"],
)
def _expand_kernel(
    y_ptr,
    h_ptr,
    b_ptr,
    route_ptr,
    table_ptr,
    scales_ptr,
    num_rows,
    stride_yt,
    stride_bp,
    vectors_ptr,
    vector_scale_ptr,
    vector_offset_ptr,
    WIDTHS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
    CHAINED: tl.constexpr,
    READS_VECTORS: tl.constexpr,
):
    tile = tl.program_id(0)
    block = tl.program_id(1).to(tl.int64)
    block_ptr = route_ptr + num_rows + 4 * block
    slot = tl.load(block_ptr).to(tl.int64)
    if slot < 0:
        return
    num_pages, pages_ptr = slot_pages(table_ptr, slot, MAX_PAGES)
    is_idle = num_pages == 0
    if READS_VECTORS:
        vector = tl.load(vectors_ptr + slot).to(tl.int64)
        is_idle &= vector < 0
    if is_idle:
        return
    start, mask_t, row = block_rows(route_ptr, block_ptr, tl.load(block_ptr + 2), BLOCK_T)

    linear, column, column_end = _place_of(tile, WIDTHS, BLOCK_N)
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_n = offs_n < column_end
    mask_y = mask_t[:, None] & mask_n[None, :]
    scale = tl.load(scales_ptr + row, mask=mask_t, other=0.0)
    y_ptrs = y_ptr + (row * stride_yt)[:, None] + offs_n[None, :]
    y = tl.load(y_ptrs, mask=mask_y, other=0.0)

    acc = lora_term(
        h_ptr, b_ptr, pages_ptr, num_pages, num_rows, start, mask_t, linear, offs_n, mask_n, stride_bp,
        WIDTHS, NUM_SPLITS, MAX_PAGES, BLOCK_T, BLOCK_N, PAGES, CHAINED,
    )  # fmt: skip
    y = y.to(tl.float32) + acc * scale[:, None]
    if READS_VECTORS:
        begin = vector * num_outputs(WIDTHS)
        # A branch and not a factor of one: rows of others keep their bits.
        if vector >= 0:
            y = apply_vectors(y, vector_scale_ptr, vector_offset_ptr, begin, offs_n, mask_n)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_y)


@triton.jit
def _place_of(tile, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The linear that a tile lies in, its first column, and where the linear's columns end."""
    linear = 0
    column = tile * BLOCK_N
    column_end = WIDTHS[0]
    begin = WIDTHS[0]
    first_tile = (WIDTHS[0] + BLOCK_N - 1) // BLOCK_N
    for s in tl.static_range(1, len(WIDTHS)):
        inside = tile >= first_tile
        linear = tl.where(inside, s, linear)
        column = tl.where(inside, begin + (tile - first_tile) * BLOCK_N, column)
        column_end = tl.where(inside, begin + WIDTHS[s], column_end)
        begin += WIDTHS[s]
        first_tile += (WIDTHS[s] + BLOCK_N - 1) // BLOCK_N
    return linear, column, column_end
