"""What an adapter consists of at a kind of site: one table, by which files are bound and pools laid out.

Shape key: S linears of a site, K inputs, N outputs of all S linears, R rank rows, W inputs or outputs of one
linear.

Another part is another row here and the kernel that reads it: binding, layout, the device pool, its memory
and what `plan` and `validate` say follow from the row. Plain Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PAGE_ROWS = 16
"""Rank rows of one page."""


class PagedBy(Enum):
    """What takes a page of a part."""

    RANK_ROWS = "rank rows"
    """16 rank rows: as many pages as the rank needs."""
    ADAPTER = "adapter"
    """The adapter: one page if it has the part, else none."""

    def num_pages(self, rank: int) -> int:
        """Pages of an adapter that has such parts, of `rank`."""
        return num_pages_of(rank) if self is PagedBy.RANK_ROWS else 1


class Spans(Enum):
    """Which side of a linear a part is as wide as."""

    INPUTS = "inputs"
    OUTPUTS = "outputs"


class Style(Enum):
    """How a linear is split over the ranks of a group."""

    COLUMN = "column"
    """By outputs: each rank computes its own ones."""
    ROW = "row"
    """By inputs: each rank computes an addend of all outputs, and an all-reduce follows."""
    REPLICATED = "replicated"


class Cut(Enum):
    """Which share of a part a rank of a group holds."""

    WHOLE = "whole"
    WIDTH = "width"
    """Its columns of the inputs or outputs that the part spans."""
    RANK_ROWS = "rank rows"
    """Its rank rows."""
    FIRST = "first"
    """The first rank all of it, the others none: an addend, which an all-reduce must count once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One row of the table."""

    name: str
    """Of its tensor in a pool and in an adapter's weights."""
    peft: str | None
    """What PEFT calls it, between a module's name and `.weight`. None: loading derives it."""
    spans: Spans
    paged_by: PagedBy
    column: tuple[Cut, Cut]
    """In a column-parallel linear: the cut by default, and the one that `fully_sharded_loras` makes."""
    row: tuple[Cut, Cut]
    """The same in a row-parallel linear."""

    @property
    def label(self) -> str:
        """What people call it: `A`."""
        return (self.peft or self.name).removeprefix("lora_")

    def page_shape(self, num_linears: int, num_inputs: int, num_outputs: int) -> tuple[int, ...]:
        """Of one page in one layer: [S, 16, K] where it spans inputs, which each linear reads with rows of
        its own; [16, N] where it spans outputs, which lie side by side. One per adapter has no rows."""
        rows = (PAGE_ROWS,) if self.paged_by is PagedBy.RANK_ROWS else ()
        if self.spans is Spans.INPUTS:
            return (num_linears, *rows, num_inputs)
        return (*rows, num_outputs)

    def width(self, num_inputs: int, num_outputs: int) -> int:
        """W of one linear."""
        return num_inputs if self.spans is Spans.INPUTS else num_outputs

    def file_shape(self, rank: int, num_inputs: int, num_outputs: int) -> tuple[int, ...]:
        """Of a linear's tensor, as PEFT has it: [R, K] where it spans inputs, [N, R] where it spans outputs;
        one per adapter is [W]."""
        width = self.width(num_inputs, num_outputs)
        if self.paged_by is PagedBy.ADAPTER:
            return (width,)
        return (rank, width) if self.spans is Spans.INPUTS else (width, rank)

    def rank_in(self, shape: tuple[int, ...]) -> int:
        """R of a tensor of `file_shape`, of a part that is paged by rank rows."""
        return shape[0] if self.spans is Spans.INPUTS else shape[1]


PARTS = (
    Part(
        name="a",
        peft="lora_A",
        spans=Spans.INPUTS,
        paged_by=PagedBy.RANK_ROWS,
        # Fully sharded, an all-gather of x A^T follows.
        column=(Cut.WHOLE, Cut.RANK_ROWS),
        row=(Cut.WIDTH, Cut.WIDTH),
    ),
    Part(
        name="b",
        peft="lora_B",
        spans=Spans.OUTPUTS,
        paged_by=PagedBy.RANK_ROWS,
        column=(Cut.WIDTH, Cut.WIDTH),
        # By default a rank's term is an addend, as its base product is. Fully sharded, x A^T is summed first
        # and each rank adds its outputs to its addend of the base product.
        row=(Cut.WHOLE, Cut.WIDTH),
    ),
    Part(
        name="scale",
        peft=None,
        spans=Spans.OUTPUTS,
        paged_by=PagedBy.ADAPTER,
        column=(Cut.WIDTH, Cut.WIDTH),
        # Each rank multiplies its whole addend.
        row=(Cut.WHOLE, Cut.WHOLE),
    ),
    Part(
        name="offset",
        peft=None,
        spans=Spans.OUTPUTS,
        paged_by=PagedBy.ADAPTER,
        column=(Cut.WIDTH, Cut.WIDTH),
        row=(Cut.FIRST, Cut.FIRST),
    ),
)
"""The parts of a linear's adapter: `scale * (y + x A^T B^T) + offset`, where y is the base's output with its
bias. Those that are one per adapter are its *vectors*."""

PAGINGS = tuple(by for by in PagedBy if any(part.paged_by is by for part in PARTS))
"""Those that occur in the table."""


def num_pages_of(rank: int) -> int:
    """Pages that `rank` rows take."""
    return -(-rank // PAGE_ROWS)


def shard(
    part: Part,
    style: Style,
    rank: int,
    size: int,
    *,
    num_rows: int,
    width: int,
    fully_sharded: bool = False,
) -> tuple[slice, slice]:
    """Which rank rows and which columns of one linear's part belong to a rank of a group.

    Shares are equal but for the last, which may be shorter or empty. An adapter's own rank rows are cut, not
    those of the highest rank, so that every rank of the group has work whatever the adapter.

    Args:
        part: of an adapter.
        style: how the base linear is split.
        rank: 0 .. size - 1, the one that asks.
        size: shares that the linear is cut into: ranks of the group, or fewer where several hold the same
            key/value heads, which then ask as one.
        num_rows: the adapter's rank rows; 1 for a part that is one per adapter.
        width: W, of the whole linear.
        fully_sharded: whether nothing is kept whole that can be cut, at the price of a collective in each
            linear.

    Returns:
        Rank rows and columns. Empty ones where the rank holds nothing, which counts as zeros.

    Example: eight rows of A [8, 64] over four ranks: the last holds `(slice(0, 8), slice(48, 64))` of a
    row-parallel linear; of a column-parallel one all, or fully sharded `(slice(6, 8), slice(0, 64))`.
    """
    cut = Cut.WHOLE
    if style is not Style.REPLICATED:
        cut = (part.column if style is Style.COLUMN else part.row)[fully_sharded]
    rows, columns = slice(0, num_rows), slice(0, width)
    if cut is Cut.RANK_ROWS:
        rows = _share(num_rows, rank, size)
    elif cut is Cut.WIDTH:
        columns = _share(width, rank, size)
    elif cut is Cut.FIRST and rank:
        columns = slice(0, 0)
    return rows, columns


def _share(length: int, rank: int, size: int) -> slice:
    share = -(-length // size)
    return slice(min(rank * share, length), min((rank + 1) * share, length))
