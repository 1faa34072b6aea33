"""The rows of a step grouped by adapter, as the CPU form multiplies them.

Shape key: T rows of the step, I pages of a batch, M rows that a page is given.

A *segment* with many rows is multiplied by itself. Segments with few rows are batched: each of their pages is
one of the I items of a batched product, with M rows of x, so that the number of operations does not grow with
the number of adapters. Example: slots [1, 0, 1, -1, 1] with pages {0: (4,), 1: (7, 5)} are the items 4, 5, 7
(ascending) with M = 3:

    rows   1 1 1 | 0 2 4 | 0 2 4    the row of x in each lane; an item with fewer rows repeats its first
    picks  3 6   0   4 7   5 8      the lanes whose sum is the term of row 0, 1, 2 and 4
    bags   0     2   3     5        where each of these rows begins in `picks`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Rows: TypeAlias = slice | torch.Tensor
"""Indices along a first dimension: a slice where they are consecutive, since a slice copies nothing."""

Targets: TypeAlias = tuple[tuple[slice, slice], ...] | torch.Tensor
"""Where results go: pairs of (rows of y, rows of the result) or, when these would be many, the row of y of
each."""

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]

BATCH_LIMITS = (4, 16)
"""Segments of up to so many rows are batched with others of about their size; larger ones are better
alone."""

MIN_RUN_ROWS = 16
"""Adding run by run costs less than adding with an index when runs have this many rows, or are at most 4."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one adapter."""

    rows: Rows
    """M rows of the step."""
    scales: torch.Tensor
    """[M, 1]."""
    pages: Rows
    """The adapter's pages of this kind of site."""
    targets: Targets


@dataclass(frozen=True, slots=True)
class SegmentBatch:
    """Several adapters with about the same number of rows."""

    rows: Rows
    """I * M: the row of x in each lane."""
    scales: torch.Tensor
    """[I, 1, M]."""
    pages: Rows
    """The I pages, ascending."""
    picks: Rows
    """The lanes that make up each row of the result, row after row."""
    bags: torch.Tensor | None
    """Where each row begins in `picks`; None when each has one lane."""
    targets: Targets


@dataclass(frozen=True, slots=True)
class KindSegments:
    """What one step does at every site of one kind."""

    segments: tuple[Segment, ...]
    batches: tuple[SegmentBatch, ...]
    vectors: tuple[tuple[Rows, int], ...] = ()
    """Rows of an adapter that has vectors, and their page: behind all terms."""


def build_segments(
    row_slots: npt.NDArray[np.int32],
    row_scales: FloatArray,
    pages: Sequence[Sequence[int]],
    vectors: Sequence[Sequence[int]] = (),
) -> KindSegments:
    """Group the rows of a step for one kind of site.

    Args:
        row_slots: [T], -1 for no adapter.
        row_scales: [T].
        pages: the pages of each slot; empty where the adapter has nothing in this kind.
        vectors: the page of each slot's vectors, or nothing.
    """
    order = np.argsort(row_slots, kind="stable").astype(np.int64)
    slots, starts = np.unique(row_slots[order], return_index=True)
    groups = list(zip(slots.tolist(), np.split(order, starts[1:]), strict=True))
    members = [(rows, pages[slot]) for slot, rows in groups if slot >= 0 and pages[slot]]
    segments: list[Segment] = []
    batches: list[SegmentBatch] = []
    low = 0
    for limit in BATCH_LIMITS:
        alike = [member for member in members if low < len(member[0]) <= limit]
        if len(alike) == 1:
            segments.append(_segment(*alike[0], row_scales))
        elif alike:
            batches.append(_batch(alike, row_scales))
        low = limit
    segments += [_segment(*member, row_scales) for member in members if len(member[0]) > low]
    return KindSegments(
        segments=tuple(segments),
        batches=tuple(batches),
        vectors=tuple(
            (_choice(rows), page) for slot, rows in groups if slot >= 0 and vectors for page in vectors[slot]
        ),
    )


def _segment(rows: IntArray, pages: Sequence[int], row_scales: FloatArray) -> Segment:
    return Segment(
        rows=_choice(rows),
        scales=torch.from_numpy(row_scales[rows][:, None]),
        pages=_choice(np.asarray(pages, dtype=np.int64)),
        targets=_targets(rows),
    )


def _batch(members: Sequence[tuple[IntArray, Sequence[int]]], row_scales: FloatArray) -> SegmentBatch:
    # Ascending pages are consecutive as often as they can be, and then need no gather.
    items = sorted(((page, rows) for rows, pages in members for page in pages), key=lambda item: item[0])
    num_rows = np.array([len(rows) for _, rows in items])
    lanes_used = np.arange(num_rows.max()) < num_rows[:, None]  # [I, M]
    lane_rows = np.repeat(np.array([rows[0] for _, rows in items])[:, None], num_rows.max(), axis=1)
    lane_rows[lanes_used] = np.concatenate([rows for _, rows in items])
    by_row = np.argsort(lane_rows[lanes_used], kind="stable")
    picks = np.flatnonzero(lanes_used)[by_row]
    result_rows, bags = np.unique(lane_rows.reshape(-1)[picks], return_index=True)
    summed = len(bags) < len(picks)
    return SegmentBatch(
        rows=_choice(lane_rows.reshape(-1)),
        scales=torch.from_numpy(row_scales[lane_rows][:, None, :]),
        pages=_choice(np.array([page for page, _ in items], dtype=np.int64)),
        picks=torch.from_numpy(picks) if summed else _choice(picks),
        bags=torch.from_numpy(bags) if summed else None,
        targets=_targets(result_rows),
    )


def _targets(rows: IntArray) -> Targets:
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    if len(runs) > max(4, len(rows) // MIN_RUN_ROWS):
        return torch.from_numpy(rows)
    ends = np.cumsum([len(run) for run in runs]).tolist()
    return tuple(
        (slice(int(run[0]), int(run[-1]) + 1), slice(end - len(run), end))
        for run, end in zip(runs, ends, strict=True)
    )


def _choice(index: IntArray) -> Rows:
    if (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index)
