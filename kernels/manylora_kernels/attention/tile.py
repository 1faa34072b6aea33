"""What the attention kernels for decode and prefill share: one tile of tokens, read and folded in.

Shape key: R rows of a tile, C tokens of a tile, D key size, E value size.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


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
