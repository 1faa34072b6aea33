"""The first product of all linears of a site: rows times the inputs' side of their adapters.

Shape key: T rows, G blocks, P' most pages of an adapter, S linears, K inputs, R = 16 * P' rank rows, Z splits
of K.

One launch for the site. A program multiplies one block of rows, in one of the Z parts of K, by the pages of
its adapter: all S linears at once and as many pages as the plan says, so that x is read once where they fit
into registers. The grid does not depend on ranks: an adapter of one page costs the same in any pool. Parts of
K are written side by side and added up by expand, in a fixed order: no atomics, no zeroed memory. Programs
past the adapters' blocks end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora_kernels.lora.plan import Plan
from manylora_kernels.lora.pool import PAGE_ROWS
from manylora_kernels.lora.routed import RoutedMix, row_stride
from manylora_kernels.lora.tile import block_rows, slot_pages


def empty_h(num_rows: int, num_linears: int, mix: RoutedMix, plan: Plan) -> torch.Tensor:
    """Make the memory for what shrink computes: [Z, T, S, R], float32, on the mix's device."""
    shape = (plan.num_splits, num_rows, num_linears, PAGE_ROWS * mix.max_pages)
    return torch.empty(shape, dtype=torch.float32, device=mix.packed.device)


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    mix: RoutedMix,
    kind: int,
    plan: Plan,
    chained: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply routed rows by A: `sum over z of h[z, i, s] = x[order[i]] A_s^T`.

    Args:
        x: [T, K], columns contiguous.
        a: [P, S, 16, K], pages contiguous.
        mix: the step's route and pages.
        kind: the kind of the site.
        plan: tile sizes; its block_rows are the route's.
        chained: whether expand is the very next launch on the stream and may start early; only where the
            device has dependent launches.
        out: from `empty_h`: where h goes. None: memory of the current stream.

    Returns:
        [Z, T, S, R], float32. Defined for routed positions i and the rank rows of their adapters' pages, no
        others.

    Raises:
        ValueError: a plan for other blocks than the route's.
    """
    mix.check_plan(plan)
    num_rows, num_linears, max_pages = x.shape[0], a.shape[1], mix.max_pages
    h = empty_h(num_rows, num_linears, mix, plan) if out is None else out
    _shrink_kernel[(plan.num_splits, mix.route.max_blocks)](
        x_ptr=x,
        a_ptr=a,
        h_ptr=h,
        route_ptr=mix.route.packed,
        table_ptr=mix.tables[kind],
        num_rows=num_rows,
        stride_xt=row_stride(x),
        stride_ap=a.stride(0),
        NUM_INPUTS=x.shape[1],
        NUM_LINEARS=num_linears,
        NUM_SPLITS=plan.num_splits,
        MAX_PAGES=max_pages,
        BLOCK_T=plan.block_rows,
        BLOCK_K=plan.shrink.width,
        PAGES=plan.shrink.pages,
        CHAINED=chained,
        num_warps=plan.shrink.num_warps,
        num_stages=plan.shrink.num_stages,
        **({"launch_pdl": True} if chained else {}),
    )
    return h


@triton.jit(
    do_not_specialize=["num_rows"],
    # A part of an upload, whose alignment changes with T.
    do_not_specialize_on_alignment=["table_ptr"],
)
def _shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    route_ptr,
    table_ptr,
    num_rows,
    stride_xt,
    stride_ap,
    NUM_INPUTS: tl.constexpr,
    NUM_LINEARS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    split = tl.program_id(0)
    block = tl.program_id(1).to(tl.int64)
    if CHAINED:
        # Every program waits before it lets expand start, so expand may read whatever was there before this
        # kernel, y above all, without waiting itself.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    block_ptr = route_ptr + num_rows + 4 * block
    slot = tl.load(block_ptr).to(tl.int64)
    if slot < 0:
        return
    num_pages, pages_ptr = slot_pages(table_ptr, slot, MAX_PAGES)
    start, mask_t, row = block_rows(route_ptr, block_ptr, tl.load(block_ptr + 2), BLOCK_T)

    offs_t = tl.arange(0, BLOCK_T)
    x_ptrs = x_ptr + row * stride_xt
    h_ptrs = h_ptr + (split.to(tl.int64) * num_rows + start + offs_t) * (NUM_LINEARS * MAX_PAGES * 16)
    if PAGES == 1:
        for first in range(num_pages):
            _shrink_pages(
                x_ptrs, a_ptr, h_ptrs, pages_ptr, mask_t, first, num_pages, split, stride_ap,
                NUM_INPUTS, NUM_LINEARS, NUM_SPLITS, MAX_PAGES, BLOCK_T, BLOCK_K, 1,
            )  # fmt: skip
    elif num_pages > 1:
        for first in range(0, num_pages, PAGES):
            _shrink_pages(
                x_ptrs, a_ptr, h_ptrs, pages_ptr, mask_t, first, num_pages, split, stride_ap,
                NUM_INPUTS, NUM_LINEARS, NUM_SPLITS, MAX_PAGES, BLOCK_T, BLOCK_K, PAGES,
            )  # fmt: skip
    elif num_pages == 1:
        _shrink_pages(
            x_ptrs, a_ptr, h_ptrs, pages_ptr, mask_t, 0, num_pages, split, stride_ap,
            NUM_INPUTS, NUM_LINEARS, NUM_SPLITS, MAX_PAGES, BLOCK_T, BLOCK_K, 1,
        )  # fmt: skip


@triton.jit
def _shrink_pages(
    x_ptrs,
    a_ptr,
    h_ptrs,
    pages_ptr,
    mask_t,
    first,
    num_pages,
    split,
    stride_ap,
    NUM_INPUTS: tl.constexpr,
    NUM_LINEARS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGES: tl.constexpr,
):
    # A page's rank rows of all linears lie one after the other.
    ROWS: tl.constexpr = NUM_LINEARS * 16
    offs_r = tl.arange(0, triton.next_power_of_2(ROWS * PAGES))
    offs_k = tl.arange(0, BLOCK_K)
    nth_page = first + offs_r // ROWS
    rank_row = offs_r % ROWS
    mask_r = (offs_r < ROWS * PAGES) & (nth_page < num_pages)
    page = tl.load(pages_ptr + nth_page, mask=mask_r, other=0).to(tl.int64)
    a_ptrs = a_ptr + (page * stride_ap + rank_row * NUM_INPUTS)[:, None] + offs_k[None, :]
    x_ptrs = x_ptrs[:, None] + offs_k[None, :]

    acc = tl.zeros([BLOCK_T, offs_r.shape[0]], dtype=tl.float32)
    STEP: tl.constexpr = NUM_SPLITS * BLOCK_K
    for i in range((NUM_INPUTS + STEP - 1) // STEP):
        k = (i * NUM_SPLITS + split) * BLOCK_K
        if NUM_INPUTS % STEP == 0:
            a = tl.load(a_ptrs + k, mask=mask_r[:, None], other=0.0)
            x = tl.load(x_ptrs + k, mask=mask_t[:, None], other=0.0)
        else:
            mask_k = k + offs_k < NUM_INPUTS
            a = tl.load(a_ptrs + k, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            x = tl.load(x_ptrs + k, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(x.to(a.dtype), a.trans(), acc=acc, input_precision="ieee")

    # h is [Z, T, S, R].
    column = (rank_row // 16) * (MAX_PAGES * 16) + nth_page * 16 + rank_row % 16
    tl.store(h_ptrs[:, None] + column[None, :], acc, mask=mask_t[:, None] & mask_r[None, :])
