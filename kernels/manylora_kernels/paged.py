"""Where the keys and values of a step's sequences lie in the blocked cache, prepared once for all layers.

Shape key: T rows (query tokens) of the step, B sequences, N most blocks of a sequence, M tokens of a block.

Sequences with one row come first. Example with blocks of 4 tokens: a decode whose sixth token is computed,
and a prompt of which tokens 2 to 4 are, give

    tables     7 2 | 5 9         the blocks of each sequence
    contexts   6 | 5             tokens that its last row may see
    starts     0 3               where the rows of each but the decodes begin, and where the last ends
    write_rows 9 | 22 23 36      where each row's key and value go: block * 4 + offset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_MIN_CONTEXT = 128
"""Contexts are counted in powers of two from here on, so that a step's launches seldom change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """The block tables of one step. Make it with `PagedBatch.build`."""

    tables: torch.Tensor
    """[B, N], int32; entries past a sequence's own blocks are 0 and not read."""
    contexts: torch.Tensor
    """[B], int32: tokens of each sequence in the cache once the step's are written; 0 for a row that pads."""
    starts: torch.Tensor
    """[B - num_decodes + 1], int32: the first row of each sequence after the decodes, and the end of the
    last, counted from the first row after the decodes."""
    write_rows: torch.Tensor
    """[T], int32: the cache row of each of the step's tokens; below 0 for a row that pads."""
    block_size: int
    """M."""
    num_decodes: int
    """The first so many sequences have one row each, the first so many of the step's."""
    max_queries: int
    """No sequence has more rows."""
    max_context: int
    """No context is longer. What is launched follows from it, so a captured graph has one for all its
    steps."""
    num_splits: int | None = None
    """Parts of a decode's context; None: chosen from B and max_context. With a number of its own a decode's
    bits depend on its own context only, not on what else is in the batch."""

    @classmethod
    def build(
        cls,
        num_queries: Sequence[int],
        contexts: Sequence[int],
        tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str,
        num_splits: int | None = None,
    ) -> PagedBatch:
        """Lay out the tables of one step, with one copy to the device.

        Args:
            num_queries: [B] rows of each sequence, at least 1; those with one row come first.
            contexts: [B] tokens of each sequence, the step's among them.
            tables: the blocks of each sequence, at least as many as its context fills.
            block_size: M.
            device: where the cache is.
            num_splits: fixes the parts of a decode's context.

        Raises:
            ValueError: a sequence without rows, with more rows than context, with too few blocks, or a longer
                one before one of one row.
        """
        queries = np.asarray(num_queries, dtype=np.int32)
        lengths = np.asarray(contexts, dtype=np.int32)
        _check(queries, lengths, tables, block_size)
        widest = max(len(table) for table in tables)
        blocks = np.zeros((len(tables), widest), dtype=np.int32)
        for own, table in zip(blocks, tables, strict=True):
            own[: len(table)] = table
        num_decodes = int((queries == 1).sum())
        starts = np.concatenate([[0], np.cumsum(queries[num_decodes:])]).astype(np.int32)
        sequence = np.repeat(np.arange(len(queries)), queries)
        # The last of a sequence's rows is at the end of its context.
        position = np.arange(len(sequence)) + (lengths - np.cumsum(queries))[sequence]
        rows = blocks[sequence, position // block_size] * block_size + position % block_size
        parts = (blocks.reshape(-1), lengths, starts, rows.astype(np.int32))
        packed = torch.from_numpy(np.concatenate(parts))
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(device, non_blocking=True)
        split = torch.split(packed, [len(part) for part in parts])
        return cls(
            tables=split[0].view(blocks.shape),
            contexts=split[1],
            starts=split[2],
            write_rows=split[3],
            block_size=block_size,
            num_decodes=num_decodes,
            max_queries=int(queries.max()),
            max_context=max(_MIN_CONTEXT, 1 << (int(lengths.max()) - 1).bit_length()),
            num_splits=num_splits,
        )

    @property
    def num_rows(self) -> int:
        """T."""
        return self.write_rows.shape[0]

    @property
    def num_seqs(self) -> int:
        """B."""
        return self.contexts.shape[0]


def _check(
    queries: np.ndarray[tuple[int], np.dtype[np.int32]],
    contexts: np.ndarray[tuple[int], np.dtype[np.int32]],
    tables: Sequence[Sequence[int]],
    block_size: int,
) -> None:
    if not 0 < len(queries) == len(contexts) == len(tables):
        raise ValueError(
            f"sequences: found {len(queries)} num_queries, {len(contexts)} contexts and {len(tables)} "
            "tables, allowed the same number, at least 1"
        )
    if (queries < 1).any() or (queries > contexts).any():
        raise ValueError(
            f"num_queries: found {queries.tolist()} with contexts {contexts.tolist()}, allowed 1 .. context"
        )
    for context, table in zip(contexts.tolist(), tables, strict=True):
        if len(table) * block_size < context:
            raise ValueError(f"tables: found {len(table)} blocks of {block_size} for a context of {context}")
    if (np.diff((queries > 1).astype(np.int8)) < 0).any():
        raise ValueError(f"num_queries: found {queries.tolist()}, allowed ones before all others")
