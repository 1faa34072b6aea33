"""The tables of a step: what is laid out, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manylora_kernels.paged import PagedBatch


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
