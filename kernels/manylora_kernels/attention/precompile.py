"""Compile every kernel that the attention of a server's steps will use, before the first of them.

Shape key: T rows, H query heads, V key/value heads, D key size, E value size, Z splits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from manylora_kernels.attention import flash as attention_flash
from manylora_kernels.attention import plan as attention_plan
from manylora_kernels.attention.paged_attention import paged_attention, write_cache
from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.attention.plan import Scoring
from manylora_kernels.shapes import AttentionShape, ServedAttention


def precompile_attention(device: torch.device, served: ServedAttention) -> None:
    """Launch every kernel once, on sequences without rows or context, whose programs end at once.

    A launch rather than a compilation by signature, so that exactly what launches look up is compiled.
    """
    for layer in dict.fromkeys(served.layers):
        keys, values = (
            torch.zeros(served.block_size, layer.num_kv * size, dtype=served.cache_dtype, device=device)
            for size in (layer.key_size, layer.value_size)
        )
        k, v = (
            torch.zeros(layer.num_kv, 1, size, dtype=dtype, device=device)
            for size, dtype in ((layer.key_size, layer.dtypes[1]), (layer.value_size, layer.dtypes[2]))
        )
        scoring = _scoring(layer, device)
        for batch in _batches(device, layer, served):
            q = torch.zeros(
                layer.num_heads, batch.num_rows, layer.key_size, dtype=layer.dtypes[0], device=device
            )
            write_cache(keys, values, k, v, batch.write_rows[:1])
            if batch.num_decodes or not _is_flash(q, layer, scoring):
                paged_attention(q, keys, values, batch, scoring)


def _scoring(layer: AttentionShape, device: torch.device) -> Scoring:
    """With any numbers: the kernels are not specialised on them."""
    sinks = None
    if layer.sinks is not None:
        sinks = torch.zeros(layer.num_heads, dtype=layer.sinks, device=device)
    return Scoring(scaling=1.0, window=layer.window, softcap=1.0 if layer.has_softcap else None, sinks=sinks)


def _is_flash(q: torch.Tensor, layer: AttentionShape, scoring: Scoring) -> bool:
    """Whether prompts go to FlashAttention, which is compiled already."""
    serves = attention_flash.serves(q, layer.value_size, scoring)
    return serves and attention_flash.varlen_attention(q.device) is not None


def _batches(device: torch.device, layer: AttentionShape, served: ServedAttention) -> Iterator[PagedBatch]:
    """A decode for each form of the splits, and a prompt for each size of tile."""
    for num_splits in _split_counts(layer, served):
        yield _empty_batch(device, served, num_decodes=1, num_splits=num_splits)
    # Tiles are smaller where no sequence has rows enough for a large one.
    for max_queries in sorted({min(2, served.max_queries), served.max_queries}):
        yield _empty_batch(device, served, max_queries=max_queries)


def _split_counts(layer: AttentionShape, served: ServedAttention) -> list[int]:
    """One Z for each kernel that decodes may use: the second pass is compiled by powers of two."""
    longest = _power_of_two(served.max_context)
    visible = min(longest, layer.window or longest)
    most = max(attention_plan.most_splits(visible), served.num_splits or 1)
    return [1 << exponent for exponent in range(_power_of_two(most).bit_length())]


def _empty_batch(
    device: torch.device,
    served: ServedAttention,
    *,
    num_decodes: int = 0,
    max_queries: int = 1,
    num_splits: int | None = None,
) -> PagedBatch:
    """One row: a decode without context, or of a prompt that has no rows at all."""
    return PagedBatch(
        tables=torch.zeros(1, 1, dtype=torch.int32, device=device),
        contexts=torch.zeros(1, dtype=torch.int32, device=device),
        starts=torch.zeros(2 - num_decodes, dtype=torch.int32, device=device),
        write_rows=torch.full((1,), -1, dtype=torch.int32, device=device),
        block_size=served.block_size,
        num_decodes=num_decodes,
        max_queries=max_queries,
        max_context=_power_of_two(served.max_context),
        num_splits=num_splits,
    )


def _power_of_two(number: int) -> int:
    """What a context counts as in a batch."""
    return 1 << (number - 1).bit_length()
