"""The proof of attention over scattered blocks.

Shape key: T rows, H query heads, D head size.
"""

from __future__ import annotations

import numpy as np
import torch
from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.attention.plan import Scoring

from bench.gpu.rows import Context

_HEADS, _KV_HEADS, _HEAD_SIZE, _BLOCK = 32, 8, 128, 16


def bits(values: torch.Tensor) -> torch.Tensor:
    """As integers, so that not a number equals itself."""
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def prove(context: Context, decodes: bool) -> str:
    """Attention over scattered blocks against float64, then repeated.

    Raises:
        AssertionError: a wrong result, or bits that differ.
    """
    from manylora_kernels.attention.paged_attention import paged_attention

    heads, kv, size = (4, 2, 16) if context.is_tiny else (_HEADS, _KV_HEADS, _HEAD_SIZE)
    contexts = (
        ([7, 19, 33] if context.is_tiny else [100 + 37 * i for i in range(32)]) if decodes else [19, 40]
    )
    queries = [1] * len(contexts) if decodes else [9, 40]
    counts = [-(-length // _BLOCK) for length in contexts]
    blocks = np.random.default_rng(0).permutation(sum(counts)).tolist()
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    batch = PagedBatch.build(queries, contexts, tables, _BLOCK, context.device)
    torch.manual_seed(0)
    rows = sum(counts) * _BLOCK
    keys, values = (
        torch.randn(rows, kv * size, device=context.device, dtype=context.dtype) for _ in range(2)
    )
    q = torch.randn(heads, sum(queries), size, device=context.device, dtype=context.dtype)
    scoring = Scoring(scaling=size**-0.5)
    first = paged_attention(q, keys, values, batch, scoring)
    error = _attention_error(first, q, keys, values, tables, queries, contexts)
    allowed = 1e-2 if context.dtype.itemsize == 2 else 1e-4
    assert error <= allowed, f"error {error:.2e}, allowed {allowed}"
    differing = torch.zeros((), dtype=torch.int64, device=context.device)
    for _ in range(context.proofs - 1):
        again = paged_attention(q, keys, values, batch, scoring)
        differing += bits(again).ne(bits(first)).any()
    assert differing.item() == 0, f"other bits in {differing.item()} of {context.proofs} runs"
    return f"same bits {context.proofs} times, error {error:.1e}"


def _attention_error(
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: list[list[int]],
    queries: list[int],
    contexts: list[int],
) -> float:
    """The largest error of all rows [T, H, D] against float64, as a share of the largest result."""
    heads, _, size = q.shape
    kv, worst, largest, row = keys.shape[1] // size, 0.0, 0.0, 0
    for table, count, length in zip(tables, queries, contexts, strict=True):
        at = torch.tensor(
            [block * _BLOCK + i for block in table for i in range(_BLOCK)][:length], device=q.device
        )
        k, v = (
            t[at].double().view(length, kv, size).repeat_interleave(heads // kv, 1) for t in (keys, values)
        )
        mine = q[:, row : row + count].double()
        scores = torch.einsum("hqd,chd->hqc", mine, k) * size**-0.5
        ahead = torch.ones(count, length, dtype=torch.bool, device=q.device).triu(length - count + 1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        wanted = torch.einsum("hqc,chd->qhd", weights, v)
        worst = max(worst, (out[row : row + count].double() - wanted).abs().max().item())
        largest = max(largest, wanted.abs().max().item())
        row += count
    return worst / largest
