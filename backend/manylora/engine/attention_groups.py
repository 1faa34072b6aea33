"""Which sequences of a step attention computes together where the paged kernels do not serve.

Shape key: B sequences of a group, Q query tokens of each, C context tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from manylora.engine.step import Pages, Step
from manylora.model.grouped_attention import Group

IntArray = npt.NDArray[np.int64]

_DECODE_SPREAD_TOKENS = 64
"""Decodes share a group while the longest context is at most twice the shortest plus this many tokens."""


def group_sequences(step: Step) -> list[list[int]]:
    """Sequences of a step in groups: decodes of similar contexts, fresh prompts of one length, and each other
    chunk by itself."""
    queries, contexts = step.num_queries.tolist(), step.contexts.tolist()
    # Rows lie as their adapters do in the pool, so that the CPU's form reads both without a gather.
    places: list[Pages] = list(zip(*step.pages, strict=True))
    order = [places[slot] if slot >= 0 else () for slot in step.slots.tolist()]
    singles = sorted((i for i, q in enumerate(queries) if q == 1), key=lambda i: contexts[i])
    groups: list[list[int]] = []
    for i in singles:
        if groups and contexts[i] <= 2 * contexts[groups[-1][0]] + _DECODE_SPREAD_TOKENS:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        group.sort(key=lambda i: order[i])
    fresh = sorted(
        (i for i, q in enumerate(queries) if 1 < q == contexts[i]), key=lambda i: (queries[i], order[i])
    )
    groups += [list(same) for _, same in groupby(fresh, key=lambda i: queries[i])]
    groups += [[i] for i, q in enumerate(queries) if 1 < q < contexts[i]]
    return groups


def make_group(
    step: Step,
    sequences: list[int],
    first_row: int,
    block_size: int,
    upload: Callable[[IntArray], torch.Tensor],
    *,
    is_whole: bool,
) -> Group:
    """The tensors of one group.

    Args:
        first_row: of the group; its sequences' rows follow each other.
        upload: brings an array to the device.
        is_whole: whether the step has no other group.
    """
    ends = step.contexts[sequences]
    num_queries = int(step.starts[sequences[0] + 1] - step.starts[sequences[0]])
    num_context = int(ends.max())
    context = None
    if num_queries == 1 or num_queries < num_context:
        # Padding repeats a sequence's own first row: the mask hides it, and no other tenant's numbers come
        # near.
        rows_BC = np.empty((len(sequences), num_context), dtype=np.int64)
        offsets = np.arange(block_size)
        for row, sequence, end in zip(rows_BC, sequences, ends.tolist(), strict=True):
            blocks = step.table(sequence).astype(np.int64)
            row[:end] = (blocks[:, None] * block_size + offsets).reshape(-1)[:end]
            row[end:] = row[0]
        context = upload(rows_BC.reshape(-1))
    stop = first_row + len(sequences) * num_queries
    return Group(
        rows=slice(None) if is_whole else slice(first_row, stop),
        num_seqs=len(sequences),
        num_queries=num_queries,
        context=context,
        positions=upload(ends[:, None] + np.arange(-num_queries, 0)),
        num_context=num_context,
    )
