"""Where the keys and values of a step's sequences lie in the blocked cache, prepared once for all layers.

Shape key: T rows (query tokens) of the step, B sequences, N most blocks of a sequence, M tokens of a block.

Sequences with one row come first. Example with blocks of 4 tokens: a decode whose sixth token is computed,
and a prompt of which tokens 2 to 4 are, give

    tables     7 2 | 5 9         the blocks of each sequence
    contexts   6 | 5             tokens that its last row may see
    starts     0 3               where the rows of each but the decodes begin, and where the last ends
    write_rows 9 | 22 23 36      where each row's key and value go: block * 4 + offset

Decodes can be padded to a fixed number of rows: a row that pads has no context and writes nothing. A captured
graph reads one batch, `blank`, that becomes each step's in turn (`copy_from`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from manylora_kernels.upload import upload

Table: TypeAlias = "Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int32]]"
"""The blocks of one sequence."""

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
    """No context is longer. Launches depend on it, so all steps of a captured graph have the same one."""
    num_splits: int | None = None
    """Parts of a decode's context; None: chosen from B and max_context. With a number of its own a decode's
    bits depend on its own context only, not on what else is in the batch."""

    @classmethod
    def build(
        cls,
        num_queries: Sequence[int],
        contexts: Sequence[int],
        tables: Sequence[Table],
        block_size: int,
        device: torch.device | str,
        num_splits: int | None = None,
        num_rows: int | None = None,
    ) -> PagedBatch:
        """Lay out the tables of one step, with one copy to the device.

        Args:
            num_queries: [B] rows of each sequence, at least 1; those with one row come first.
            contexts: [B] tokens of each sequence, the step's among them.
            tables: the blocks of each sequence, at least as many as its context fills; as arrays, which are
                copied, or as sequences, which are read number by number.
            block_size: M.
            device: where the cache is.
            num_splits: fixes the parts of a decode's context.
            num_rows: pads a step of decodes to so many rows.

        Raises:
            ValueError: a sequence without rows, with more rows than context, with too few blocks, or a longer
                one before one of one row; more sequences than `num_rows`, or one of more rows beside it.
        """
        queries = np.asarray(num_queries, dtype=np.int32)
        lengths = np.asarray(contexts, dtype=np.int32)
        _check(queries, lengths, tables, block_size)
        num_padding = 0 if num_rows is None else _num_padding(queries, num_rows)
        widest = max(len(table) for table in tables)
        blocks = np.zeros((len(tables) + num_padding, widest), dtype=np.int32)
        for own, table in zip(blocks, tables, strict=False):
            own[: len(table)] = table
        num_decodes = int((queries == 1).sum())
        starts = np.concatenate([[0], np.cumsum(queries[num_decodes:])]).astype(np.int32)
        sequence = np.repeat(np.arange(len(queries)), queries)
        # The last of a sequence's rows is at the end of its context.
        position = np.arange(len(sequence)) + (lengths - np.cumsum(queries))[sequence]
        rows = blocks[sequence, position // block_size] * block_size + position % block_size
        parts = (
            blocks.reshape(-1),
            np.pad(lengths, (0, num_padding)),
            starts,
            np.pad(rows.astype(np.int32), (0, num_padding), constant_values=-1),
        )
        packed = upload(np.concatenate(parts), device)
        split = torch.split(packed, [len(part) for part in parts])
        return cls(
            tables=split[0].view(blocks.shape),
            contexts=split[1],
            starts=split[2],
            write_rows=split[3],
            block_size=block_size,
            num_decodes=num_decodes + num_padding,
            max_queries=int(queries.max()),
            max_context=_rounded(int(lengths.max())),
            num_splits=num_splits,
        )

    @classmethod
    def blank(
        cls,
        num_rows: int,
        max_context: int,
        block_size: int,
        device: torch.device | str,
        num_splits: int | None = None,
    ) -> PagedBatch:
        """Make a batch in which all rows pad, for a captured graph: it can become any decodes.

        Args:
            num_rows: B and T.
            max_context: no sequence is longer; fixes N and what is launched.
            block_size: M.
            device: where the cache is.
            num_splits: fixes the parts of a decode's context.

        Raises:
            ValueError: no rows, or no context.
        """
        if num_rows < 1 or max_context < 1:
            raise ValueError(
                f"blank: found {num_rows} rows and max_context={max_context}, allowed at least 1 of both"
            )
        num_blocks = -(-max_context // block_size)
        return cls(
            tables=torch.zeros(num_rows, num_blocks, dtype=torch.int32, device=device),
            contexts=torch.zeros(num_rows, dtype=torch.int32, device=device),
            starts=torch.zeros(1, dtype=torch.int32, device=device),
            write_rows=torch.full((num_rows,), -1, dtype=torch.int32, device=device),
            block_size=block_size,
            num_decodes=num_rows,
            max_queries=1,
            max_context=_rounded(max_context),
            num_splits=num_splits,
        )

    def first(self, num_rows: int) -> PagedBatch:
        """The first rows of a batch of decodes, in the same memory.

        Raises:
            ValueError: more rows than there are, none, or rows that are no decodes.
        """
        if not 1 <= num_rows <= self.num_decodes == self.num_rows:
            raise ValueError(
                f"first: asked for {num_rows} rows of {self.num_decodes} decodes in {self.num_rows} rows, "
                "allowed from 1 to all, where all are decodes"
            )
        return replace(
            self,
            tables=self.tables[:num_rows],
            contexts=self.contexts[:num_rows],
            write_rows=self.write_rows[:num_rows],
            num_decodes=num_rows,
        )

    def copy_from(self, other: PagedBatch) -> None:
        """Become another step's decodes, in place: a graph captured with this batch then serves them.

        Nothing waits, and only the columns that the other one's tables have are copied: what lies behind a
        sequence's own blocks is never read.

        Raises:
            ValueError: another number of rows, rows that are no decodes, blocks of another size, longer
                contexts or more blocks than this batch has room for.
        """
        width = other.tables.shape[1]
        if not self.num_decodes == self.num_rows == other.num_rows == other.num_decodes:
            raise ValueError(
                f"batch: asked to copy one of {other.num_decodes} decodes in {other.num_rows} rows, allowed "
                f"{self.num_rows} decodes"
            )
        if (
            self.block_size != other.block_size
            or self.max_context < other.max_context
            or self.tables.shape[1] < width
        ):
            raise ValueError(
                f"batch: asked to copy one of contexts to {other.max_context} in {width} blocks of "
                f"{other.block_size}, allowed {self.max_context} in {self.tables.shape[1]} of "
                f"{self.block_size}"
            )
        self.tables[:, :width].copy_(other.tables)
        self.contexts.copy_(other.contexts)
        self.write_rows.copy_(other.write_rows)

    @property
    def num_rows(self) -> int:
        """T."""
        return self.write_rows.shape[0]

    @property
    def num_seqs(self) -> int:
        """B."""
        return self.contexts.shape[0]


def _rounded(context: int) -> int:
    return int(max(_MIN_CONTEXT, 1 << (context - 1).bit_length()))


def _num_padding(queries: np.ndarray[tuple[int], np.dtype[np.int32]], num_rows: int) -> int:
    if num_rows < len(queries) or (queries > 1).any():
        raise ValueError(
            f"num_rows: found {num_rows} for sequences of {queries.tolist()} rows, allowed at least one for "
            "each, of decodes only"
        )
    return num_rows - len(queries)


def _check(
    queries: np.ndarray[tuple[int], np.dtype[np.int32]],
    contexts: np.ndarray[tuple[int], np.dtype[np.int32]],
    tables: Sequence[Table],
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
