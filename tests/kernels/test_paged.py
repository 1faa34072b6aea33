"""The tables of a step: what is laid out, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manylora_kernels.attention.paged_batch import PagedBatch


def test_the_worked_example_of_the_page() -> None:
    batch = PagedBatch.build([1, 3], [6, 5], [[7, 2], [5, 9]], 4, "cpu")
    assert batch.tables.tolist() == [[7, 2], [5, 9]]
    assert batch.contexts.tolist() == [6, 5]
    assert batch.starts.tolist() == [0, 3]
    assert batch.write_rows.tolist() == [9, 22, 23, 36]
    assert (batch.num_decodes, batch.max_queries, batch.num_rows, batch.num_seqs) == (1, 3, 4, 2)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=6), st.integers(1, 17))
def test_rows_are_where_the_tables_say(lengths: list[tuple[int, int]], block_size: int) -> None:
    lengths.sort(key=lambda pair: pair[0] > 1)
    queries = [num for num, _ in lengths]
    contexts = [num + before for num, before in lengths]
    tables: list[list[int]] = []
    for context in contexts:
        first = sum(map(len, tables))
        tables.append(list(range(first, first + -(-context // block_size))))
    batch = PagedBatch.build(queries, contexts, tables, block_size, "cpu")
    rows = [
        table[c // block_size] * block_size + c % block_size
        for table, context, num in zip(tables, contexts, queries, strict=True)
        for c in range(context - num, context)
    ]
    assert batch.write_rows.tolist() == rows
    assert batch.num_decodes == queries.count(1)
    assert batch.starts.diff().tolist() == queries[batch.num_decodes :]
    assert batch.max_context >= max(contexts)


@pytest.mark.parametrize(
    ("queries", "contexts", "tables", "message"),
    [
        ([], [], [], "sequences: found 0 num_queries"),
        ([1], [1, 2], [[0]], "1 num_queries, 2 contexts and 1 tables"),
        ([0], [1], [[0]], r"num_queries: found \[0\] with contexts \[1\]"),
        ([3], [2], [[0]], r"num_queries: found \[3\] with contexts \[2\]"),
        ([1], [5], [[0]], "tables: found 1 blocks of 4 for a context of 5"),
        ([2, 1], [2, 1], [[0], [1]], r"found \[2, 1\], allowed ones before all others"),
    ],
    ids=["nothing", "uneven", "no_rows", "more_rows_than_context", "blocks_lack", "order"],
)
def test_refuses(queries: list[int], contexts: list[int], tables: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedBatch.build(queries, contexts, tables, 4, "cpu")


def test_padding_adds_rows_without_context() -> None:
    batch = PagedBatch.build([1, 1], [6, 5], [[7, 2], [5, 9]], 4, "cpu", num_rows=4)
    assert batch.tables.tolist() == [[7, 2], [5, 9], [0, 0], [0, 0]]
    assert batch.contexts.tolist() == [6, 5, 0, 0]
    assert batch.write_rows.tolist() == [9, 36, -1, -1]
    assert batch.starts.tolist() == [0]
    assert (batch.num_decodes, batch.num_rows, batch.num_seqs) == (4, 4, 4)


@pytest.mark.parametrize(
    ("queries", "num_rows"), [([1, 1], 1), ([1, 2], 4)], ids=["too_few_rows", "a_prompt"]
)
def test_refuses_to_pad(queries: list[int], num_rows: int) -> None:
    with pytest.raises(ValueError, match=rf"num_rows: found {num_rows} for sequences of"):
        PagedBatch.build(queries, [3, 3], [[0], [1]], 4, "cpu", num_rows=num_rows)


def test_a_blank_batch_becomes_one_step_after_another() -> None:
    static = PagedBatch.blank(8, 40, 4, "cpu")
    assert list(static.tables.shape) == [8, 10]
    assert set(static.write_rows.tolist()) == {-1}
    steps = [([6, 5], [[7, 2], [5, 9]]), ([12], [[1, 2, 3]]), ([40, 1, 2], [list(range(10)), [11], [12]])]
    for contexts, tables in steps:
        for num_rows in (8, 3):
            mine = static.first(num_rows)
            step = PagedBatch.build([1] * len(contexts), contexts, tables, 4, "cpu", num_rows=num_rows)
            mine.copy_from(step)
            assert mine.tables[:, : step.tables.shape[1]].tolist() == step.tables.tolist()
            assert mine.contexts.tolist() == step.contexts.tolist()
            assert mine.write_rows.tolist() == step.write_rows.tolist()
            # The same memory, and what is launched does not change with the step.
            assert static.contexts[:num_rows].tolist() == step.contexts.tolist()
            assert (mine.max_context, mine.num_rows, mine.num_decodes) == (128, num_rows, num_rows)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (([1, 1], [5, 3], [[0, 1], [2]], 4), "one of 2 decodes in 2 rows, allowed 3 decodes"),
        (([1, 2], [5, 3], [[0, 1], [2]], 4), "one of 1 decodes in 3 rows, allowed 3 decodes"),
        (([1, 1, 1], [5, 3, 1], [[0, 1], [2], [3]], 8), "in 2 blocks of 8, allowed 128 in 2 of 4"),
        (([1, 1, 1], [9, 3, 1], [[0, 1, 4], [2], [3]], 4), "in 3 blocks of 4, allowed 128 in 2 of 4"),
        (([1, 1, 1], [129, 3, 1], [list(range(33)), [2], [3]], 4), "contexts to 256 in 33 blocks of 4"),
    ],
    ids=["fewer_rows", "a_prompt", "other_blocks", "more_blocks", "longer_contexts"],
)
def test_refuses_to_take(step: tuple[list[int], list[int], list[list[int]], int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedBatch.blank(3, 8, 4, "cpu").copy_from(PagedBatch.build(*step, "cpu"))


def test_refuses_blanks_and_parts_of_nothing() -> None:
    with pytest.raises(ValueError, match="found 0 rows and max_context=8"):
        PagedBatch.blank(0, 8, 4, "cpu")
    with pytest.raises(ValueError, match="asked for 4 rows of 3 decodes"):
        PagedBatch.blank(3, 8, 4, "cpu").first(4)
    with pytest.raises(ValueError, match="asked for 1 rows of 1 decodes in 3 rows"):
        PagedBatch.build([1, 2], [5, 3], [[0, 1], [2]], 4, "cpu").first(1)
