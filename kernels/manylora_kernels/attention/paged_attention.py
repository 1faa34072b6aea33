"""Attention over the blocked cache on a GPU: checks the arguments and chooses the kernels.

Shape key: T rows, B sequences, H query heads, V key/value heads, D key size, E value size, M tokens of a
block.
"""

from __future__ import annotations

import functools

import torch

from manylora_kernels.attention import flash as attention_flash
from manylora_kernels.attention import plan as attention_plan
from manylora_kernels.attention.cache_write import write_cache
from manylora_kernels.attention.decode import decode_attention
from manylora_kernels.attention.head_rows import head_rows, is_aligned
from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.attention.plan import MAX_HEAD_SIZE, Gpu, Scoring
from manylora_kernels.attention.prefill import prefill_attention

__all__ = ["Scoring", "paged_attention", "write_cache"]


def paged_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, scoring: Scoring
) -> torch.Tensor:
    """Attend causally to the cache, which holds the keys and values of the step's own tokens, too.

    `out[t, h] = sum over c of softmax_c(score(q[h, t], key[c, v])) value[c, v]`, v = h // (H / V), over the
    tokens c of the row's sequence up to its own position.

    Args:
        q: [H, T, D]; copied where `head_rows` does so.
        keys: [cache rows, V * D], contiguous; row = block * M + offset.
        values: [cache rows, V * E], contiguous.
        batch: built for these T rows.
        scoring: the layer's.

    Returns:
        [T, H, E], of q's dtype; zeros for rows of a sequence without context.

    Raises:
        ValueError: shapes, strides, dtypes or devices that do not belong together.
    """
    num_kv = _check(q, keys, values, batch, scoring)
    q = head_rows(q)
    num_heads, num_rows, _ = q.shape
    out = torch.empty(num_rows, num_heads, values.shape[1] // num_kv, dtype=q.dtype, device=q.device)
    num_decodes = batch.num_decodes
    if num_decodes:
        _decode(out[:num_decodes], q[:, :num_decodes], keys, values, batch, scoring)
    if num_decodes < num_rows:
        of_prompts = out[num_decodes:]
        # Rows of heads of an odd size begin anywhere behind the decodes.
        target = of_prompts if is_aligned(of_prompts) else torch.empty_like(of_prompts)
        _prefill(target, head_rows(q[:, num_decodes:]), keys, values, batch, scoring)
        if target is not of_prompts:
            of_prompts.copy_(target)
    return out


def _decode(
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    scoring: Scoring,
) -> None:
    num_heads, num_seqs, key_size = q.shape
    num_kv = keys.shape[1] // key_size
    plan = attention_plan.decode(
        num_seqs=num_seqs,
        num_kv=num_kv,
        per_kv=num_heads // num_kv,
        max_visible=min(batch.max_context, scoring.window or batch.max_context),
        largest_size=max(key_size, out.shape[2]),
        dtype=keys.dtype,
        gpu=Gpu.of(q.device),
        num_splits=batch.num_splits,
    )
    decode_attention(
        out=out,
        q=q,
        keys=keys,
        values=values,
        tables=batch.tables[:num_seqs],
        contexts=batch.contexts[:num_seqs],
        sinks=_sinks(scoring, num_heads, q.device),
        block_size=batch.block_size,
        scoring=scoring,
        plan=plan,
    )


def _prefill(
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    scoring: Scoring,
) -> None:
    num_heads, _, key_size = q.shape
    tables, contexts = batch.tables[batch.num_decodes :], batch.contexts[batch.num_decodes :]
    if attention_flash.serves(q, out.shape[2], scoring):
        varlen = attention_flash.varlen_attention(q.device)
        if varlen is not None:
            out.copy_(attention_flash.attend(varlen, q, keys, values, tables, contexts, batch, scoring))
            return
    plan = attention_plan.prefill(
        max_queries=batch.max_queries,
        per_kv=num_heads * key_size // keys.shape[1],
        largest_size=max(key_size, out.shape[2]),
        dtype=keys.dtype,
        gpu=Gpu.of(q.device),
    )
    prefill_attention(
        out=out,
        q=q,
        keys=keys,
        values=values,
        tables=tables,
        contexts=contexts,
        starts=batch.starts,
        sinks=_sinks(scoring, num_heads, q.device),
        block_size=batch.block_size,
        scoring=scoring,
        plan=plan,
    )


def _sinks(scoring: Scoring, num_heads: int, device: torch.device) -> torch.Tensor:
    return _no_sinks(num_heads, device) if scoring.sinks is None else scoring.sinks


@functools.lru_cache(maxsize=64)
def _no_sinks(num_heads: int, device: torch.device) -> torch.Tensor:
    """Cached: made in a captured graph, it would be filled again in each replay."""
    return torch.full((num_heads,), float("-inf"), device=device)


def _check(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, scoring: Scoring
) -> int:
    """Return V."""
    num_heads, num_rows, key_size = q.shape
    num_kv = keys.shape[1] // key_size
    if num_rows != batch.num_rows:
        raise ValueError(f"q: found {num_rows} rows, the batch has {batch.num_rows}")
    if num_kv == 0 or keys.shape[1] % key_size or num_heads % num_kv or values.shape[1] % num_kv:
        raise ValueError(
            f"heads: found {num_heads} of size {key_size} in q, rows of {keys.shape[1]} keys and "
            f"{values.shape[1]} values, allowed whole key/value heads that divide the query heads"
        )
    if max(key_size, values.shape[1] // num_kv) > MAX_HEAD_SIZE:
        raise ValueError(
            f"head sizes: found {key_size} and {values.shape[1] // num_kv}, allowed up to {MAX_HEAD_SIZE}"
        )
    if keys.shape[0] != values.shape[0] or keys.shape[0] % batch.block_size:
        raise ValueError(
            f"cache: found {keys.shape[0]} rows of keys and {values.shape[0]} of values, allowed the same "
            f"number of whole blocks of {batch.block_size}"
        )
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError(
            f"strides: found keys {keys.stride()}, values {values.stride()}, allowed contiguous ones"
        )
    if keys.dtype != values.dtype or scoring.softcap == 0 or scoring.window < 0:
        raise ValueError(
            f"found keys {keys.dtype}, values {values.dtype}, softcap {scoring.softcap}, window "
            f"{scoring.window}; allowed one dtype, a softcap other than 0 or None, a window of at least 0"
        )
    if scoring.sinks is not None and (scoring.sinks.shape != (num_heads,) or scoring.sinks.stride(0) != 1):
        raise ValueError(f"sinks: found {list(scoring.sinks.shape)}, allowed contiguous [{num_heads}]")
    if not q.device == keys.device == values.device == batch.tables.device:
        raise ValueError(
            f"devices: found q {q.device}, keys {keys.device}, values {values.device}, batch "
            f"{batch.tables.device}, allowed the same"
        )
    return num_kv
