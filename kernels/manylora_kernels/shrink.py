"""The first product of all linears of a site: rows times the inputs' side of their adapters.

Shape key: T rows, G blocks, P' most pages of an adapter, S linears, K inputs, R = 16 * P' rank rows, Z splits
of K.

One launch for the site. A program multiplies one block of rows, in one of the Z parts of K, by one page: all
S linears at once, so that x is read once for each page. Parts of K are written side by side and added up by
expand, in a fixed order: no atomics, no zeroed memory. Programs past the blocks or an adapter's pages end at
once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora_kernels.plan import Plan
from manylora_kernels.pool import PAGE_ROWS
from manylora_kernels.routed import RoutedMix


def shrink(x: torch.Tensor, a: torch.Tensor, mix: RoutedMix, kind: int, plan: Plan) -> torch.Tensor:
    """Multiply routed rows by A: `sum over z of h[z, i, s] = x[order[i]] A_s^T`.

    Args:
        x: [T, K], columns contiguous.
        a: [P, S, 16, K], pages contiguous.
        mix: the step's route and pages.
        kind: the kind of the site.
        plan: tile sizes; its block_rows are the route's.

    Returns:
        [Z, T, S, R], float32. Defined for routed positions i and the rank rows of their adapters' pages, no
        others.

    Raises:
        ValueError: a plan for other blocks than the route's.
    """
    if plan.block_rows != mix.route.block_rows:
        raise ValueError(f"plan for blocks of {plan.block_rows} rows, the route has {mix.route.block_rows}")
    num_rows, num_inputs = x.shape
    num_linears = a.shape[1]
    num_ranks = PAGE_ROWS * mix.max_pages
    h = torch.empty(plan.num_splits, num_rows, num_linears, num_ranks, dtype=torch.float32, device=x.device)
    _shrink_kernel[(mix.route.max_blocks, plan.num_splits, mix.max_pages)](
        x_ptr=x,
        a_ptr=a,
        h_ptr=h,
        order_ptr=mix.route.order,
        blocks_ptr=mix.route.blocks,
        counts_ptr=mix.counts[kind],
        table_ptr=mix.tables[kind],
        num_rows=num_rows,
        max_blocks=mix.route.max_blocks,
        max_pages=mix.max_pages,
        num_inputs=num_inputs,
        stride_xt=x.stride(0),
        stride_ap=a.stride(0),
        NUM_LINEARS=num_linears,
        BLOCK_T=plan.block_rows,
        BLOCK_K=plan.block_inputs,
        BLOCK_R=triton.next_power_of_2(num_linears * PAGE_ROWS),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return h


@triton.jit(
    do_not_specialize=["num_rows", "max_blocks"],
    # Parts of one upload, whose alignment changes with T.
    do_not_specialize_on_alignment=["counts_ptr", "table_ptr"],
)
def _shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    order_ptr,
    blocks_ptr,
    counts_ptr,
    table_ptr,
    num_rows,
    max_blocks,
    max_pages,
    num_inputs,
    stride_xt,
    stride_ap,
    NUM_LINEARS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    nth_page = tl.program_id(2).to(tl.int64)
    num_splits = tl.num_programs(1)
    rows = tl.load(blocks_ptr + 2 * max_blocks + block)
    if rows == 0:
        return
    slot = tl.load(blocks_ptr + block)
    if nth_page >= tl.load(counts_ptr + slot):
        return
    start = tl.load(blocks_ptr + max_blocks + block).to(tl.int64)
    page = tl.load(table_ptr + slot.to(tl.int64) * max_pages + nth_page).to(tl.int64)

    offs_t = tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_t = offs_t < rows
    mask_r = offs_r < NUM_LINEARS * 16
    row = tl.load(order_ptr + start + offs_t, mask=mask_t, other=0).to(tl.int64)
    x_ptrs = x_ptr + row[:, None] * stride_xt + offs_k[None, :]
    a_ptrs = a_ptr + page * stride_ap + offs_r[:, None].to(tl.int64) * num_inputs + offs_k[None, :]

    acc = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for k in range(split.to(tl.int32) * BLOCK_K, num_inputs, num_splits * BLOCK_K):
        mask_k = k + offs_k < num_inputs
        a = tl.load(a_ptrs + k, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        x = tl.load(x_ptrs + k, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(x.to(a.dtype), a.trans(), acc=acc, input_precision="ieee")

    # Rank row r of the page belongs to linear r // 16: h is [Z, T, S, R].
    num_ranks = max_pages * 16
    position = (split * num_rows + start + offs_t.to(tl.int64)) * NUM_LINEARS
    column = (offs_r // 16) * num_ranks + nth_page * 16 + offs_r % 16
    h_ptrs = h_ptr + position[:, None] * num_ranks + column[None, :]
    tl.store(h_ptrs, acc, mask=mask_t[:, None] & mask_r[None, :])
