"""What the attention kernels for decode and prefill share: queries and heads, and one tile of tokens.

Shape key: R rows of a tile, C tokens of a tile, D key size, E value size.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_queries(q_ptrs, head, stride_qh, mask_r, like_ptr, KEY_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries [R, D] of one query head for each row, in the cache's dtype.

    Args:
        q_ptrs: where the row's first head begins: one pointer for all rows, or [R, 1].
        head: [R].
        stride_qh: in elements.
        like_ptr: into the cache.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < KEY_SIZE
    q_ptrs = q_ptrs + head[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_r[:, None] & mask_d[None, :], other=0.0)
    return q.to(like_ptr.dtype.element_ty)


@triton.jit
def head_columns(cache_ptr, kv, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers [1, D] to one key/value head in the cache's first row, and which of them are in the head."""
    offs = tl.arange(0, BLOCK)
    return cache_ptr + kv * SIZE + offs[None, :], offs < SIZE


@triton.jit
def load_tile(
    k_ptrs,
    v_ptrs,
    stride_kr,
    stride_vr,
    table_ptr,
    offs_c,
    end,
    mask_d,
    mask_e,
    KV_BLOCK: tl.constexpr,
):
    """Keys [C, D] and values [C, E] of tokens, through their sequence's block table; 0 from `end` on."""
    mask_c = offs_c < end
    block = tl.load(table_ptr + offs_c // KV_BLOCK, mask=mask_c, other=0).to(tl.int64)
    row = block * KV_BLOCK + offs_c % KV_BLOCK
    k = tl.load(k_ptrs + row[:, None] * stride_kr, mask=mask_c[:, None] & mask_d[None, :], other=0.0)
    v = tl.load(v_ptrs + row[:, None] * stride_vr, mask=mask_c[:, None] & mask_e[None, :], other=0.0)
    return k, v


@triton.jit
def sink_start(sink):
    """A running softmax that has seen only a sink, a score without value: the highest score and the sum of
    weights. A sink of -inf is none."""
    top = sink.to(tl.float32) * _LOG2E
    return top, tl.where(top == float("-inf"), 0.0, 1.0)


@triton.jit
def fold_tile(acc, top, total, q, k, v, visible, factor, cap, HAS_CAP: tl.constexpr):
    """Add one tile to a running softmax: acc [R, E], the highest score and the sum of weights [R] each.

    Scores are in powers of two. `visible` is a mask that broadcasts to [R, C], or None where all is seen.
    """
    scores = tl.dot(q, k.trans(), input_precision="ieee") * factor
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)); the factor makes `scores` the exponent.
        scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores))
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen nothing yet would subtract infinity from infinity.
    level = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - level[:, None])
    decay = tl.exp2(top - level)
    total = total * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc=acc * decay[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def averaged(acc, total):
    """What a running softmax has come to: acc [R, E] over the sum of weights; 0 where nothing was seen."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
