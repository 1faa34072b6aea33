"""The table of parts: shapes, and how each part is cut for a rank of a group."""

from __future__ import annotations

import manylora_kernels
import numpy as np
import numpy.typing as npt
import pytest
from manylora.model.parts import PAGE_ROWS, PARTS, PagedBy, Part, Style, shard
from manylora.model.spec import SiteKind, page_groups

Array = npt.NDArray[np.float64]
KIND = SiteKind(name="q+k", num_layers=3, in_features=10, out_features=(6, 2))
K, N, T = 24, 20, 5


def test_a_page_is_of_16_rank_rows_as_the_kernels_have_it() -> None:
    assert PAGE_ROWS == manylora_kernels.PAGE_ROWS
    assert [by.num_pages(rank) for by in PagedBy for rank in (1, 16, 17)] == [1, 1, 2, 1, 1, 1]


def test_pages_have_the_shapes_that_the_kernels_read() -> None:
    assert {part.name: KIND.page_shape(part) for part in PARTS} == {
        "a": (2, 16, 10),
        "b": (16, 8),
        "scale": (8,),
        "offset": (8,),
    }
    assert KIND.page_elements() == 16 * 3 * (2 * 10 + 8)
    assert KIND.page_elements(PagedBy.ADAPTER) == 3 * 2 * 8


def test_files_have_the_shapes_that_peft_writes() -> None:
    assert {part.peft: part.file_shape(4, 10, 6) for part in PARTS if part.peft} == {
        "lora_A": (4, 10),
        "lora_B": (6, 4),
    }


def test_groups_of_rank_rows_have_the_numbers_of_their_kinds() -> None:
    groups = page_groups([KIND, KIND])
    assert [group.paged_by for group in groups[:2]] == [PagedBy.RANK_ROWS] * 2
    assert sum(group.page_elements for group in groups) == sum(2 * KIND.page_elements(by) for by in PagedBy)
    assert sorted(part.name for group in groups for part in group.parts) == sorted(
        [part.name for part in PARTS] * 2
    )


class Adapter:
    """One linear [N, K] and an adapter's parts of it, in the layout of a file."""

    def __init__(self, num_rows: int) -> None:
        random = np.random.default_rng(num_rows)
        self.num_rows = num_rows
        self.x = random.normal(size=(T, K))
        self.weight = random.normal(size=(N, K))
        self.parts = {part.name: random.normal(size=part.file_shape(num_rows, K, N)) for part in PARTS}

    def held(self, part: Part, style: Style, rank: int, size: int, fully_sharded: bool) -> Array:
        """What a rank holds of a part, zeros for the rest."""
        by_rows = part.paged_by is PagedBy.RANK_ROWS
        rows, columns = shard(
            part,
            style,
            rank,
            size,
            num_rows=self.num_rows if by_rows else 1,
            width=part.width(K, N),
            fully_sharded=fully_sharded,
        )
        whole = self.parts[part.name]
        mine = np.zeros_like(whole)
        if not by_rows:
            mine[columns] = whole[columns]
        elif part.file_shape(1, 3, 2)[0] == 1:
            mine[rows, columns] = whole[rows, columns]
        else:
            mine[columns, rows] = whole[columns, rows]
        return mine

    def term(self, parts: dict[str, Array], x: Array) -> Array:
        return x @ parts["a"].T @ parts["b"].T

    def whole(self) -> Array:
        y = self.x @ self.weight.T + self.term(self.parts, self.x)
        return y * self.parts["scale"] + self.parts["offset"]


def share(length: int, rank: int, size: int) -> slice:
    part = -(-length // size)
    return slice(min(length, rank * part), min(length, (rank + 1) * part))


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["default", "fully_sharded"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_column_parallel_ranks_make_the_whole_output_side_by_side(
    num_rows: int, size: int, fully_sharded: bool
) -> None:
    adapter = Adapter(num_rows)
    held = [
        {part.name: adapter.held(part, Style.COLUMN, rank, size, fully_sharded) for part in PARTS}
        for rank in range(size)
    ]
    shrunk = [adapter.x @ parts["a"].T for parts in held]
    # Fully sharded, an all-gather of rank rows: what a rank does not hold is zero here, so it is a sum.
    gathered = [sum(shrunk)] * size if fully_sharded else shrunk
    found = np.zeros((T, N))
    for rank, (h, parts) in enumerate(zip(gathered, held, strict=True)):
        mine = share(N, rank, size)
        y = adapter.x @ adapter.weight.T + h @ parts["b"].T
        found[:, mine] = (y * parts["scale"] + parts["offset"])[:, mine]
    np.testing.assert_allclose(found, adapter.whole(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["default", "fully_sharded"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_row_parallel_ranks_make_addends_of_the_whole_output(
    num_rows: int, size: int, fully_sharded: bool
) -> None:
    adapter = Adapter(num_rows)
    addends, shrunk, held = [], [], []
    for rank in range(size):
        mine = share(K, rank, size)
        parts = {part.name: adapter.held(part, Style.ROW, rank, size, fully_sharded) for part in PARTS}
        addends.append(adapter.x[:, mine] @ adapter.weight[:, mine].T)
        shrunk.append(adapter.x[:, mine] @ parts["a"][:, mine].T)
        held.append(parts)
    # Fully sharded, an all-reduce of what A gives; the base product's own finishes both.
    reduced = [sum(shrunk)] * size if fully_sharded else shrunk
    found = sum(
        (addend + h @ parts["b"].T) * parts["scale"] + parts["offset"]
        for addend, h, parts in zip(addends, reduced, held, strict=True)
    )
    np.testing.assert_allclose(found, adapter.whole(), rtol=1e-12, atol=1e-12)


def test_an_adapters_own_rank_rows_are_cut() -> None:
    """A rank of 5 in a group of 4: 2, 2, 1 and no rows; every other rank has work whatever the page is."""
    a = PARTS[0]
    cut = [shard(a, Style.COLUMN, rank, 4, num_rows=5, width=K, fully_sharded=True)[0] for rank in range(4)]
    assert cut == [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5)]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: str(part.name))
def test_a_replicated_linear_keeps_everything(part: Part) -> None:
    whole = (slice(0, 7), slice(0, 9))
    assert shard(part, Style.REPLICATED, 1, 4, num_rows=7, width=9, fully_sharded=True) == whole
