"""Attention of decodes over the blocked cache: one query for each sequence.

Shape key: B sequences, H query heads, V key/value heads, G = H / V, D key size, E value size, N most blocks
of a sequence, M tokens of a block, Z splits of a context.

A program computes all G query heads of one key/value head over one part of one context, so that every key is
read once. A second pass adds up the parts in their order: no atomics, the same bits in every run. Programs
past a context's parts end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora_kernels.attention.head_rows import head_strides, stride_unit
from manylora_kernels.attention.plan import SPLIT_TOKENS, Scoring, TilePlan
from manylora_kernels.attention.tile import (
    averaged,
    fold_tile,
    head_columns,
    load_queries,
    load_tile,
    sink_start,
)


def decode_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    sinks: torch.Tensor,
    block_size: int,
    scoring: Scoring,
    plan: TilePlan,
) -> None:
    """Attend with the last token of each sequence.

    `out[b, h] = sum over c of softmax_c(score(q[h, b], key[c, v])) value[c, v]`, v = h // G, over the tokens
    c that are visible from position `contexts[b] - 1`.

    Args:
        out: [B, H, E], contiguous, to be written; zeros where a context is 0.
        q: [H, B, D], as `head_rows` makes it.
        keys: [rows, V * D], contiguous.
        values: [rows, V * E], contiguous.
        tables: [B, N], int32, rows contiguous.
        contexts: [B], int32.
        sinks: [H], -inf for none.
        block_size: M.
        scoring: the layer's.
        plan: tile sizes and Z.
    """
    num_heads, num_seqs, key_size = q.shape
    num_kv, value_size = keys.shape[1] // key_size, out.shape[2]
    num_splits = plan.num_splits
    stride_qh, stride_qt = head_strides(q)
    is_split = num_splits > 1
    parts = sums = out
    if is_split:
        parts = torch.empty(num_seqs, num_heads, num_splits, value_size, dtype=torch.float32, device=q.device)
        sums = torch.empty(num_seqs, num_heads, num_splits, dtype=torch.float32, device=q.device)
    _decode_kernel[(num_splits, num_kv, num_seqs)](
        out_ptr=parts,
        sums_ptr=sums,
        q_ptr=q,
        keys_ptr=keys,
        values_ptr=values,
        tables_ptr=tables,
        contexts_ptr=contexts,
        sinks_ptr=sinks,
        stride_qh=stride_qh,
        stride_qt=stride_qt,
        stride_kr=keys.stride(0),
        stride_vr=values.stride(0),
        stride_tb=tables.stride(0),
        factor=scoring.factor,
        cap=scoring.cap,
        window=scoring.window,
        GROUP=num_heads // num_kv,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        STRIDE_UNIT=stride_unit(key_size),
        KV_BLOCK=block_size,
        SPLIT_TOKENS=SPLIT_TOKENS,
        BLOCK_G=plan.block_rows,
        BLOCK_C=plan.block_tokens,
        BLOCK_D=max(16, triton.next_power_of_2(key_size)),
        BLOCK_E=max(16, triton.next_power_of_2(value_size)),
        HAS_CAP=scoring.softcap is not None,
        IS_SPLIT=is_split,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    if is_split:
        _merge_kernel[(num_heads, num_seqs)](
            out_ptr=out,
            parts_ptr=parts,
            sums_ptr=sums,
            contexts_ptr=contexts,
            num_splits=num_splits,
            window=scoring.window,
            VALUE_SIZE=value_size,
            SPLIT_TOKENS=SPLIT_TOKENS,
            BLOCK_Z=triton.next_power_of_2(num_splits),
            BLOCK_E=triton.next_power_of_2(value_size),
            # Few enough that a thread has more than one element to store.
            num_warps=1 if value_size <= 64 else 2,
        )


@triton.jit
def _visible_from(context, window):
    """The first token that the last one sees."""
    return tl.where(window > 0, tl.maximum(context - window, 0), 0)


@triton.jit
def _tokens_of_split(visible, num_splits, SPLIT_TOKENS: tl.constexpr):
    """How many tokens each part has, the last one perhaps fewer."""
    return tl.cdiv(tl.cdiv(visible, num_splits), SPLIT_TOKENS) * SPLIT_TOKENS


@triton.jit(
    # The strides of q are counted in units, so that what divides them is known whatever they are.
    do_not_specialize=["stride_qh", "stride_qt", "stride_tb", "window"],
    # Parts of one upload, whose alignment changes with B, and a parameter of the model's.
    do_not_specialize_on_alignment=["tables_ptr", "contexts_ptr", "sinks_ptr"],
)
def _decode_kernel(
    out_ptr,
    sums_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    contexts_ptr,
    sinks_ptr,
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
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    split = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1).to(tl.int64)
    seq = tl.program_id(2).to(tl.int64)
    num_splits = tl.num_programs(0)
    context = tl.load(contexts_ptr + seq)
    begin = _visible_from(context, window)
    tokens = _tokens_of_split(context - begin, num_splits, SPLIT_TOKENS)
    begin += split.to(tl.int32) * tokens
    if IS_SPLIT and begin >= context:
        return
    end = tl.minimum(begin + tokens, context)

    offs_g = tl.arange(0, BLOCK_G)
    offs_c = tl.arange(0, BLOCK_C)
    offs_e = tl.arange(0, BLOCK_E)
    mask_g = offs_g < GROUP
    head = kv * GROUP + offs_g
    q_ptr += seq * (stride_qt * STRIDE_UNIT)
    q = load_queries(q_ptr, head, stride_qh * STRIDE_UNIT, mask_g, keys_ptr, KEY_SIZE, BLOCK_D)
    table_ptr = tables_ptr + seq * stride_tb
    k_ptrs, mask_d = head_columns(keys_ptr, kv, KEY_SIZE, BLOCK_D)
    v_ptrs, mask_e = head_columns(values_ptr, kv, VALUE_SIZE, BLOCK_E)

    # A sink is one more score, of no value: the first part has it.
    sink = tl.load(sinks_ptr + head, mask=mask_g & (split == 0), other=float("-inf"))
    top, total = sink_start(sink)
    acc = tl.zeros([BLOCK_G, BLOCK_E], dtype=tl.float32)
    for c in range(begin, end, BLOCK_C):
        k, v = load_tile(
            k_ptrs, v_ptrs, stride_kr, stride_vr, table_ptr, c + offs_c, end, mask_d, mask_e, KV_BLOCK
        )
        visible = (c + offs_c < end)[None, :]
        acc, top, total = fold_tile(acc, top, total, q, k, v, visible, factor, cap, HAS_CAP)

    acc = averaged(acc, total)
    num_heads = tl.num_programs(1) * GROUP
    position = seq * num_heads + head
    if IS_SPLIT:
        position = position * num_splits + split
        tl.store(sums_ptr + position, top + tl.log2(total), mask=mask_g)
    out_ptrs = out_ptr + position[:, None] * VALUE_SIZE + offs_e[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_g[:, None] & mask_e[None, :])


@triton.jit(do_not_specialize=["num_splits", "window"], do_not_specialize_on_alignment=["contexts_ptr"])
def _merge_kernel(
    out_ptr,
    parts_ptr,
    sums_ptr,
    contexts_ptr,
    num_splits,
    window,
    VALUE_SIZE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    seq = tl.program_id(1).to(tl.int64)
    context = tl.load(contexts_ptr + seq)
    visible = context - _visible_from(context, window)
    tokens = _tokens_of_split(visible, num_splits, SPLIT_TOKENS)

    offs_z = tl.arange(0, BLOCK_Z)
    offs_e = tl.arange(0, BLOCK_E)
    # Parts past the context were never written.
    mask_z = offs_z * tokens < visible
    mask_e = offs_e < VALUE_SIZE
    position = seq * tl.num_programs(0) + head
    offs_p = position * num_splits + offs_z
    sums = tl.load(sums_ptr + offs_p, mask=mask_z, other=float("-inf"))
    parts_ptrs = parts_ptr + offs_p[:, None] * VALUE_SIZE + offs_e[None, :]
    parts = tl.load(parts_ptrs, mask=mask_z[:, None] & mask_e[None, :], other=0.0)
    top = tl.max(sums, axis=0)
    weights = tl.exp2(sums - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + position * VALUE_SIZE + offs_e, out.to(out_ptr.dtype.element_ty), mask=mask_e)
