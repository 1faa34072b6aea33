"""What the kernels of the adapters' term share: a block's rows, a slot's pages, the term of one tile of y.

Shape key: T rows of a block, P' most pages of an adapter, S linears, N outputs of all S, R = 16 * P' rank
rows, Z splits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot_pages(table_ptr, slot, MAX_PAGES: tl.constexpr):
    """How many pages a slot's adapter has in this kind, and where they are listed; slot -1 has none."""
    entry_ptr = table_ptr + slot * (1 + MAX_PAGES)
    return tl.load(entry_ptr, mask=slot >= 0, other=0), entry_ptr + 1


@triton.jit
def block_rows(route_ptr, block_ptr, rows, BLOCK_T: tl.constexpr):
    """Where a block of the route begins, which of T rows it has, and which rows of the step these are.

    Args:
        rows: how many it has, from `block_ptr + 2`.
    """
    start = tl.load(block_ptr + 1).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T)
    mask_t = offs_t < rows
    return start, mask_t, tl.load(route_ptr + start + offs_t, mask=mask_t, other=0).to(tl.int64)


@triton.jit
def num_outputs(WIDTHS: tl.constexpr):
    """N."""
    total = 0
    for s in tl.static_range(len(WIDTHS)):
        total += WIDTHS[s]
    return total


@triton.jit
def lora_term(
    h_ptr,
    b_ptr,
    pages_ptr,
    num_pages,
    num_rows,
    start,
    mask_t,
    linear,
    offs_n,
    mask_n,
    stride_bp,
    WIDTHS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """`(sum over z of h[z, start + t, linear]) B` of one tile, not yet scaled."""
    h_ptrs = h_ptr + ((start + tl.arange(0, BLOCK_T)) * len(WIDTHS) + linear) * (MAX_PAGES * 16)
    if PAGES == 1:
        acc = _expand_pages(
            h_ptrs, b_ptr, pages_ptr, num_pages, num_rows, mask_t, offs_n, mask_n, stride_bp,
            WIDTHS, NUM_SPLITS, MAX_PAGES, MAX_PAGES, BLOCK_T, BLOCK_N, 1, CHAINED,
        )  # fmt: skip
    elif num_pages > 1:
        acc = _expand_pages(
            h_ptrs, b_ptr, pages_ptr, num_pages, num_rows, mask_t, offs_n, mask_n, stride_bp,
            WIDTHS, NUM_SPLITS, MAX_PAGES, MAX_PAGES, BLOCK_T, BLOCK_N, PAGES, CHAINED,
        )  # fmt: skip
    else:
        acc = _expand_pages(
            h_ptrs, b_ptr, pages_ptr, num_pages, num_rows, mask_t, offs_n, mask_n, stride_bp,
            WIDTHS, NUM_SPLITS, MAX_PAGES, 1, BLOCK_T, BLOCK_N, 1, CHAINED,
        )  # fmt: skip
    return acc


@triton.jit
def _expand_pages(
    h_ptrs,
    b_ptr,
    pages_ptr,
    num_pages,
    num_rows,
    mask_t,
    offs_n,
    mask_n,
    stride_bp,
    WIDTHS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    MOST_HERE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    b = _load_b(b_ptr, pages_ptr, 0, num_pages, offs_n, mask_n, stride_bp, WIDTHS, PAGES)
    if CHAINED:
        # Up to here nothing of shrink's was read.
        tl.extra.cuda.gdc_wait()
    h = _load_h(h_ptrs, 0, num_pages, num_rows, mask_t, len(WIDTHS), NUM_SPLITS, MAX_PAGES, BLOCK_T, PAGES)
    acc = tl.dot(h.to(b.dtype), b, acc=acc, input_precision="ieee")
    if MOST_HERE > PAGES:
        for first in range(PAGES, num_pages, PAGES):
            b = _load_b(b_ptr, pages_ptr, first, num_pages, offs_n, mask_n, stride_bp, WIDTHS, PAGES)
            h = _load_h(
                h_ptrs, first, num_pages, num_rows, mask_t, len(WIDTHS), NUM_SPLITS, MAX_PAGES, BLOCK_T, PAGES
            )
            acc = tl.dot(h.to(b.dtype), b, acc=acc, input_precision="ieee")
    return acc


@triton.jit
def _load_b(
    b_ptr,
    pages_ptr,
    first,
    num_pages,
    offs_n,
    mask_n,
    stride_bp,
    WIDTHS: tl.constexpr,
    PAGES: tl.constexpr,
):
    offs_r = tl.arange(0, 16 * PAGES)
    nth_page = first + offs_r // 16
    mask_r = nth_page < num_pages
    page = tl.load(pages_ptr + nth_page, mask=mask_r, other=0).to(tl.int64)
    b_ptrs = b_ptr + (page * stride_bp + (offs_r % 16) * num_outputs(WIDTHS))[:, None] + offs_n[None, :]
    return tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)


@triton.jit
def _load_h(
    h_ptrs,
    first,
    num_pages,
    num_rows,
    mask_t,
    NUM_LINEARS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAGES: tl.constexpr,
):
    offs_r = tl.arange(0, 16 * PAGES)
    mask_h = mask_t[:, None] & (first + offs_r // 16 < num_pages)[None, :]
    stride_hz = num_rows.to(tl.int64) * (NUM_LINEARS * MAX_PAGES * 16)
    h = tl.zeros([BLOCK_T, 16 * PAGES], dtype=tl.float32)
    # As many parts at once as registers are free: a decode step has many and small ones.
    UNROLL: tl.constexpr = min(NUM_SPLITS, 4) if BLOCK_T <= 32 else 1
    for split in tl.range(0, NUM_SPLITS, num_stages=1, loop_unroll_factor=UNROLL):
        part = h_ptrs[:, None] + split * stride_hz + first * 16 + offs_r[None, :]
        h += tl.load(part, mask=mask_h, other=0.0)
    return h
