"""Attention of prompts, whole or in chunks, over the blocked cache: packed rows, many for each sequence.

Shape key: T rows, B sequences, H query heads, V key/value heads, G = H / V, D key size, E value size, N most
blocks of a sequence, M tokens of a block.

The keys and values of the rows themselves are in the cache already, so that a whole prompt and a later chunk
are one case. A tile holds `block_rows // G` query tokens of one sequence, each with the G query heads that
share a key. Where B sequences have T rows there are at most `T // tokens + B` tiles, which is the grid; a
program finds its sequence by bisection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora_kernels.attention.head_rows import head_strides, stride_unit
from manylora_kernels.attention.plan import Scoring, TilePlan
from manylora_kernels.attention.tile import (
    averaged,
    fold_tile,
    head_columns,
    load_queries,
    load_tile,
    sink_start,
)


def prefill_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    starts: torch.Tensor,
    sinks: torch.Tensor,
    block_size: int,
    scoring: Scoring,
    plan: TilePlan,
) -> None:
    """Attend with the last tokens of each sequence, causally.

    Row t of sequence b is at position `p = contexts[b] - starts[b + 1] + t` and sees tokens c <= p:
    `out[t, h] = sum over c of softmax_c(score(q[h, t], key[c, h // G])) value[c, h // G]`.

    Args:
        out: [T, H, E], contiguous, to be written.
        q: [H, T, D], as `head_rows` makes it.
        keys: [rows, V * D], contiguous.
        values: [rows, V * E], contiguous.
        tables: [B, N], int32, rows contiguous.
        contexts: [B], int32.
        starts: [B + 1], int32, from 0 to T.
        sinks: [H], -inf for none.
        block_size: M.
        scoring: the layer's.
        plan: tile sizes.
    """
    num_heads, num_rows, key_size = q.shape
    num_kv, value_size = keys.shape[1] // key_size, out.shape[2]
    per_kv, num_seqs = num_heads // num_kv, contexts.shape[0]
    stride_qh, stride_qt = head_strides(q)
    num_tiles = num_rows // (plan.block_rows // per_kv) + num_seqs
    _prefill_kernel[(num_tiles, num_kv)](
        out_ptr=out,
        q_ptr=q,
        keys_ptr=keys,
        values_ptr=values,
        tables_ptr=tables,
        contexts_ptr=contexts,
        starts_ptr=starts,
        sinks_ptr=sinks,
        num_seqs=num_seqs,
        stride_qh=stride_qh,
        stride_qt=stride_qt,
        stride_kr=keys.stride(0),
        stride_vr=values.stride(0),
        stride_tb=tables.stride(0),
        factor=scoring.factor,
        cap=scoring.cap,
        window=scoring.window,
        GROUP=per_kv,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        STRIDE_UNIT=stride_unit(key_size),
        KV_BLOCK=block_size,
        BLOCK_R=plan.block_rows,
        BLOCK_C=plan.block_tokens,
        BLOCK_D=max(16, triton.next_power_of_2(key_size)),
        BLOCK_E=max(16, triton.next_power_of_2(value_size)),
        HAS_CAP=scoring.softcap is not None,
        HAS_WINDOW=scoring.window > 0,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


@triton.jit
def _sequence_of_tile(starts_ptr, num_seqs, tile, TILE_TOKENS: tl.constexpr):
    """A tile's sequence, and which of its tiles it is: those of b begin at `starts[b] // TILE_TOKENS + b`."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        begin = tl.load(starts_ptr + middle) // TILE_TOKENS + middle
        low = tl.where(begin <= tile, middle, low)
        high = tl.where(begin <= tile, high, middle)
    begin = tl.load(starts_ptr + low) // TILE_TOKENS + low
    return low, tile - begin


@triton.jit(
    # The strides of q are counted in units, so that what divides them is known whatever they are.
    do_not_specialize=["num_seqs", "stride_qh", "stride_qt", "stride_tb", "window"],
    # Parts of one upload, whose alignment changes with T and B, and a parameter of the model's.
    do_not_specialize_on_alignment=["tables_ptr", "contexts_ptr", "starts_ptr", "sinks_ptr"],
)
def _prefill_kernel(
    out_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    contexts_ptr,
    starts_ptr,
    sinks_ptr,
    num_seqs,
    stride_qh,
    stride_qt,
    stride_kr,
    stride_vr,
    stride_tb,
    factor,
    cap,
    window,
    GROUP: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    TILE_TOKENS: tl.constexpr = BLOCK_R // GROUP
    # A sequence's last tiles see the most and start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    seq, nth_tile = _sequence_of_tile(starts_ptr, num_seqs, tile, TILE_TOKENS)
    start = tl.load(starts_ptr + seq)
    num_queries = tl.load(starts_ptr + seq + 1) - start
    first = nth_tile * TILE_TOKENS
    if first >= num_queries:
        return
    context = tl.load(contexts_ptr + seq)
    first_position = context - num_queries + first
    end = tl.minimum(first_position + TILE_TOKENS, context)

    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    offs_e = tl.arange(0, BLOCK_E)
    token = offs_r // GROUP
    head = kv * GROUP + offs_r % GROUP
    mask_r = (token < TILE_TOKENS) & (first + token < num_queries)
    position = first_position + token
    query_row = (start + first + token).to(tl.int64)
    q_ptrs = q_ptr + query_row[:, None] * (stride_qt * STRIDE_UNIT)
    q = load_queries(q_ptrs, head, stride_qh * STRIDE_UNIT, mask_r, keys_ptr, KEY_SIZE, BLOCK_D)
    table_ptr = tables_ptr + seq.to(tl.int64) * stride_tb
    k_ptrs, mask_d = head_columns(keys_ptr, kv, KEY_SIZE, BLOCK_D)
    v_ptrs, mask_e = head_columns(values_ptr, kv, VALUE_SIZE, BLOCK_E)

    top, total = sink_start(tl.load(sinks_ptr + head, mask=mask_r, other=float("-inf")))
    acc = tl.zeros([BLOCK_R, BLOCK_E], dtype=tl.float32)
    begin = 0
    # Tokens before the first row's position are seen by all rows, unless a window hides them. Without a
    # context that position is below 0.
    all_seen = tl.maximum(first_position, 0) // BLOCK_C * BLOCK_C
    if HAS_WINDOW:
        begin = tl.maximum(first_position + 1 - window, 0) // BLOCK_C * BLOCK_C
        all_seen = begin
    for c in range(begin, all_seen, BLOCK_C):
        k, v = load_tile(
            k_ptrs, v_ptrs, stride_kr, stride_vr, table_ptr, c + offs_c, end, mask_d, mask_e, KV_BLOCK
        )
        acc, top, total = fold_tile(acc, top, total, q, k, v, None, factor, cap, HAS_CAP)
    for c in range(all_seen, end, BLOCK_C):
        k, v = load_tile(
            k_ptrs, v_ptrs, stride_kr, stride_vr, table_ptr, c + offs_c, end, mask_d, mask_e, KV_BLOCK
        )
        visible = (c + offs_c)[None, :] <= position[:, None]
        if HAS_WINDOW:
            visible &= (c + offs_c)[None, :] > position[:, None] - window
        acc, top, total = fold_tile(acc, top, total, q, k, v, visible, factor, cap, HAS_CAP)

    acc = averaged(acc, total)
    num_heads = tl.num_programs(1) * GROUP
    out_ptrs = out_ptr + (query_row * num_heads + head)[:, None] * VALUE_SIZE + offs_e[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_e[None, :])
