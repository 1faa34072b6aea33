"""The specification: every other form is tested against these few lines of float32 PyTorch.

Shape key of adapters: T rows, D adapters of the step, S linears, K inputs, N outputs of all S, R = 16 * pages
rank rows. Of attention: T rows, H query heads, V key/value heads, D key size, E value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.attention.plan import Scoring
from manylora_kernels.lora.pool import SitePool


def shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Multiply rows by the inputs' side of one adapter: `h[t, s] = x[t] A_s^T`.

    Args:
        x: [T, K].
        a: [pages, S, 16, K], the adapter's pages.

    Returns:
        [T, S, R], float32.
    """
    h = torch.einsum("tk,psrk->tspr", x.float(), a.float())
    return h.flatten(2)


def expand(h: torch.Tensor, b: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Multiply by the outputs' side of one adapter: `y[t, s] = h[t, s] B_s^T`, all s side by side.

    Args:
        h: [T, S, R], float32.
        b: [pages, 16, N], the adapter's pages.
        widths: outputs of each linear.

    Returns:
        [T, N], float32.
    """
    parts = torch.split(b.float().flatten(0, 1), list(widths), dim=1)
    return torch.cat([h[:, s] @ part for s, part in enumerate(parts)], dim=1)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: SitePool,
    row_slots: Sequence[int],
    row_scales: Sequence[float],
    pages: Sequence[Sequence[int]],
    vectors: Sequence[Sequence[int]] | None = None,
) -> None:
    """Add the adapters' term of one site in place: `y[t, s] += scale[t] * (x[t] A_s^T) B_s^T`.

    Rows whose adapter has vectors then become `y[t] * scale_v + offset_v`, of its page v; a row's own scale
    does not multiply these. y has the base's bias in it: an adapter whose factors are not to reach the bias
    has `(1 - scale_v) * bias` in its offset. All is computed in float32 and rounded once.

    Rows without an adapter (slot -1), or whose adapter has nothing here, are neither read nor written.

    Args:
        y: [T, N].
        x: [T, K].
        row_slots: [T], -1 .. D-1.
        row_scales: [T].
        pages: the pages of each slot in this kind of site.
        vectors: for each slot its page of vectors, if it has one.
    """
    for t, slot in enumerate(row_slots):
        if slot < 0:
            continue
        row = y[t].float()
        if pages[slot]:
            mine = list(pages[slot])
            term = expand(shrink(x[t : t + 1], pool.a[mine]), pool.b[mine], pool.widths)
            row = row + row_scales[t] * term[0]
        for page in vectors[slot] if vectors else ():
            assert pool.vectors is not None, "the pool has no vectors"
            row = row * pool.vectors.scale[page].float() + pool.vectors.offset[page].float()
        if pages[slot] or (vectors and vectors[slot]):
            y[t] = row.to(y.dtype)


def silu_mul(y: torch.Tensor) -> torch.Tensor:
    """Compute what stands behind a gate/up site: `silu(gate) * up` with `gate, up = y[:, :N], y[:, N:]`.

    Args:
        y: [T, 2 * N], with the adapters' terms.

    Returns:
        [T, N], float32.
    """
    gate, up = y.float().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, scoring: Scoring
) -> torch.Tensor:
    """Attend causally to blocked keys and values: what `attention.paged_attention` says.

    Args:
        q: [H, T, D].
        keys: [cache rows, V * D].
        values: [cache rows, V * E].

    Returns:
        [T, H, E], float32.
    """
    num_heads, num_rows, key_size = q.shape
    num_kv = keys.shape[1] // key_size
    first_rows = [*range(batch.num_decodes), *(batch.starts + batch.num_decodes).tolist()]
    out = torch.empty(num_rows, num_heads, values.shape[1] // num_kv, device=q.device)
    sequences = zip(batch.tables, batch.contexts.tolist(), pairwise(first_rows), strict=True)
    for table, context, (first, end) in sequences:
        token = torch.arange(context, device=q.device)
        position = token[context - (end - first) :, None]
        row = table[token // batch.block_size] * batch.block_size + token % batch.block_size
        k, v = (
            cache[row].float().view(context, num_kv, -1).repeat_interleave(num_heads // num_kv, dim=1)
            for cache in (keys, values)
        )
        scores = torch.einsum("htd,chd->htc", q[:, first:end].float(), k) * scoring.scaling
        if scoring.softcap is not None:
            scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
        hidden = (token > position) | (token <= position - (scoring.window or context))
        scores = scores.masked_fill(hidden, float("-inf"))
        if scoring.sinks is not None:
            sinks = scoring.sinks.float().view(-1, 1, 1).expand(-1, end - first, 1)
            scores = torch.cat([scores, sinks], dim=2)
        weights = scores.softmax(dim=2)[:, :, :context]
        out[first:end] = torch.einsum("htc,che->the", weights, v)
    return out
