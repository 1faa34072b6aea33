"""Count what attention would compile while a server runs, which needs no GPU, and print it as JSON.

A program of its own, beside count_compilations.py, which says why.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from count_compilations import CPU, compiled, use_a_driver_that_does_nothing
from manylora_kernels import AttentionShape, ServedAttention
from manylora_kernels.attention.paged_attention import paged_attention, write_cache
from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.attention.plan import Scoring
from manylora_kernels.attention.precompile import precompile_attention

BLOCK_SIZE = 16
MAX_CONTEXT = 5000
MAX_QUERIES = 600
BF16 = (torch.bfloat16,) * 3


@dataclass(frozen=True)
class Layer:
    """A layer of a model, and the numbers that it serves with."""

    shape: AttentionShape
    caps: Sequence[float] = ()
    """Soft caps that layers of this form have."""


def shape(heads: int, num_kv: int, size: int, value_size: int = 0, **rules: object) -> AttentionShape:
    given: dict[str, object] = {"dtypes": BF16} | rules
    return AttentionShape(
        num_heads=heads,
        num_kv=num_kv,
        key_size=size,
        value_size=value_size or size,
        **given,  # type: ignore[arg-type]  # by name
    )


LAYERS = {
    "llama": Layer(shape(4, 2, 64)),
    "window": Layer(shape(4, 2, 64, window=128)),
    "window_of_1": Layer(shape(4, 2, 64, window=1)),
    "long_window": Layer(shape(4, 1, 64, window=4096)),
    "softcap": Layer(shape(4, 4, 128, has_softcap=True), (50.0, 1.0, 16.0)),
    "sinks": Layer(shape(8, 1, 64, sinks=torch.bfloat16, window=128)),
    "one_head": Layer(shape(1, 1, 64)),
    "size_80": Layer(shape(4, 2, 80)),
    "other_value_size": Layer(shape(4, 2, 192, 128)),
    "float32_queries": Layer(shape(4, 2, 64, dtypes=(torch.float32, torch.bfloat16, torch.bfloat16))),
    # Sizes that 16 bytes do not hold whole: addresses and strides differ from step to step.
    "size_20": Layer(shape(3, 1, 20)),
    "size_5": Layer(shape(1, 1, 5)),
}


def steps() -> Iterator[tuple[list[int], list[int]]]:
    """(rows of each sequence, contexts): decodes of every number, prompts and chunks of many lengths."""
    for num_seqs in range(1, 66):
        yield [1] * num_seqs, [1 + (37 * i * num_seqs) % MAX_CONTEXT for i in range(num_seqs)]
    for context in (1, 2, 15, 16, 17, 127, 128, 129, 500, 1000, 2500, MAX_CONTEXT):
        yield [1], [context]
        yield [1, 1], [context, 1]
    for num_rows in [*range(2, 40), 63, 64, 65, 128, 300, MAX_QUERIES]:
        yield [num_rows], [num_rows]
        yield [num_rows, 3], [MAX_CONTEXT, 3]
        # Behind every number of decodes, so that prompts begin at every row.
        num_decodes = num_rows % 17
        yield [1] * num_decodes + [num_rows, 2], [7 * (i + 1) for i in range(num_decodes)] + [num_rows, 2]


def batch_of(queries: list[int], contexts: list[int]) -> PagedBatch:
    tables = [list(range(1 + (context - 1) // BLOCK_SIZE)) for context in contexts]
    return PagedBatch.build(queries, contexts, tables, BLOCK_SIZE, CPU)


def layouts(num_heads: int, num_rows: int, size: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """[H, T, D] as models hand it over: rows first, heads first, part of a projection, odd strides."""
    yield torch.empty(num_rows, num_heads, size, dtype=dtype).transpose(0, 1)
    yield torch.empty(num_heads, num_rows, size, dtype=dtype)
    projection = torch.empty(num_rows, (num_heads + 2) * size, dtype=dtype)
    yield projection[:, size : (num_heads + 1) * size].unflatten(1, (num_heads, size)).transpose(0, 1)
    yield torch.empty(num_rows, num_heads, size + 3, dtype=dtype)[:, :, 1 : size + 1].transpose(0, 1)
    yield torch.empty(size, num_rows, num_heads, dtype=dtype).permute(2, 1, 0)


def scorings(layer: Layer) -> Iterator[Scoring]:
    """Numbers that may differ: scaling, cap and where the sinks lie."""
    own = layer.shape
    for i, scaling in enumerate((0.125, 1.0, 1)):
        sinks = (
            None
            if own.sinks is None
            else torch.empty(own.num_heads + 3, dtype=own.sinks)[i:][: own.num_heads]
        )
        caps = layer.caps or (None,)
        yield Scoring(scaling=scaling, window=own.window, softcap=caps[i % len(caps)], sinks=sinks)


def serve(layer: Layer) -> None:
    own = layer.shape
    keys = torch.empty(64 * BLOCK_SIZE, own.num_kv * own.key_size, dtype=torch.bfloat16)
    values = torch.empty(64 * BLOCK_SIZE, own.num_kv * own.value_size, dtype=torch.bfloat16)
    rules = list(scorings(layer))
    for queries, contexts in steps():
        batch = batch_of(queries, contexts)
        scoring = rules[len(queries) % len(rules)]
        for q in layouts(own.num_heads, batch.num_rows, own.key_size, own.dtypes[0]):
            paged_attention(q, keys, values, batch, scoring)
            if batch.num_decodes:
                paged_attention(q, keys, values, replace(batch, num_splits=7), scoring)
        every_k = layouts(own.num_kv, batch.num_rows, own.key_size, own.dtypes[1])
        every_v = layouts(own.num_kv, batch.num_rows, own.value_size, own.dtypes[2])
        for k, v in zip(every_k, every_v, strict=True):
            write_cache(keys, values, k, v, batch.write_rows)


def count(layer: Layer) -> dict[str, object]:
    """What is compiled before and while one layer serves; kernels of other layers do not count."""
    served = ServedAttention(
        layers=(layer.shape,),
        cache_dtype=torch.bfloat16,
        block_size=BLOCK_SIZE,
        max_context=MAX_CONTEXT,
        max_queries=MAX_QUERIES,
        num_splits=7,
    )
    compiled.clear()
    precompile_attention(CPU, served)
    before = len(compiled)
    compiled.clear()
    serve(layer)
    return {"before": before, "while_serving": Counter(compiled)}


def main() -> None:
    use_a_driver_that_does_nothing()
    serve(Layer(shape(4, 2, 32)))
    cold = len(compiled)
    print(json.dumps({"cold": cold, "layers": {name: count(layer) for name, layer in LAYERS.items()}}))


if __name__ == "__main__":
    main()
