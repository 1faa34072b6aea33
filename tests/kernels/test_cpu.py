"""The CPU form against the reference: odd steps, dtypes, NaN wherever it must not look."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manylora_kernels import Mix, SitePool, add_lora, reference
from manylora_kernels.lora import native
from manylora_kernels.lora.segments import SegmentBatch, build_segments

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["compiled", "products"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on both forms; dtypes that the compiled form does not serve go to torch's products."""
    if request.param == "products":
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        assert native.library() is not None, "the compiled form could not be built"
    name: str = request.param
    return name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(step: str, dtype: torch.dtype, make_case: Any, agrees: Any) -> None:
    case = make_case(step, dtype, "cpu")
    expected = case.expected()
    mix = Mix.build(case.slots, case.scales, [case.pages], 4, 3, "cpu", vectors=[case.vectors])
    add_lora(case.y, case.x, case.pool, mix, 0)
    agrees(case.y, expected)
    beyond = case.y._base
    assert beyond is not None
    assert beyond[:, case.pool.num_outputs :].isnan().all(), "wrote past the end of a row"


def test_takes_a_pool_of_another_dtype(make_case: Any, agrees: Any) -> None:
    case = make_case("rank_24_and_40", torch.float32, "cpu")
    pool = SitePool(case.pool.a.bfloat16(), case.pool.b.bfloat16(), case.pool.widths)
    expected = case.y.clone()
    reference.add_lora(expected, case.x, pool, case.slots.tolist(), case.scales.tolist(), case.pages)
    mix = Mix.build(case.slots, case.scales, [case.pages], max_slots=4, max_pages=3, device="cpu")
    add_lora(case.y, case.x, pool, mix, 0)
    agrees(case.y, expected)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Rows in any order over adapters with any pages, so that every way of grouping is taken."""
    num_slots = draw(st.integers(1, 6))
    free = draw(st.permutations(range(24)))
    pages: list[tuple[int, ...]] = []
    for _ in range(num_slots):
        count = draw(st.integers(0, 4))
        pages.append(tuple(free[:count]))
        free = free[count:]
    with_vectors = draw(st.lists(st.booleans(), min_size=num_slots, max_size=num_slots))
    vectors = [(5 - slot,) if has else () for slot, has in enumerate(with_vectors)]
    runs = draw(st.lists(st.tuples(st.integers(-1, num_slots - 1), st.integers(1, 24)), max_size=12))
    slots = [slot for slot, length in runs for _ in range(length)]
    return (slots if draw(st.booleans()) else list(draw(st.permutations(slots)))), pages, vectors


@settings(max_examples=80, deadline=None)
@given(steps())
def test_any_order_of_rows_and_pages_agrees_with_the_reference(
    drawn: tuple[list[int], list[tuple[int, ...]], list[tuple[int, ...]]],
) -> None:
    slots, pages, vectors = drawn
    generator = torch.Generator().manual_seed(1)
    pool = SitePool(
        torch.randn(24, 2, 16, 12, generator=generator) / 4,
        torch.randn(24, 16, 10, generator=generator) / 4,
        (7, 3),
        torch.randn(6, 10, generator=generator),
        torch.randn(6, 10, generator=generator),
    )
    x = torch.randn(len(slots), 12, generator=generator)
    y = torch.randn(len(slots), 10, generator=generator)
    scales = np.linspace(-1, 1, len(slots), dtype=np.float32)
    expected = y.clone()
    reference.add_lora(expected, x, pool, slots, scales.tolist(), pages, vectors)
    mix = Mix.build(np.array(slots, dtype=np.int32), scales, [pages], 6, 4, "cpu", vectors=[vectors])
    add_lora(y, x, pool, mix, 0)
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5)
    for t, slot in enumerate(slots):
        if slot < 0 or not (pages[slot] or vectors[slot]):
            assert torch.equal(y[t], expected[t])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_neighbour_with_vectors_changes_no_bit_of_others(dtype: torch.dtype, make_case: Any) -> None:
    """The adapter itself is another with vectors and without."""
    results = []
    for has_vectors in (False, True):
        case = make_case("vectors_of_some", dtype, "cpu")
        vectors = [case.vectors] if has_vectors else []
        mix = Mix.build(case.slots, case.scales, [case.pages], 4, 3, "cpu", vectors=vectors)
        add_lora(case.y, case.x, case.pool, mix, 0)
        results.append(case.y)
    for t, slot in enumerate(case.slots):
        if slot >= 0 and case.vectors[slot]:
            assert not torch.equal(results[0][t], results[1][t])
        else:
            assert torch.equal(results[0][t].nan_to_num(7.0), results[1][t].nan_to_num(7.0))


def test_the_worked_example_of_the_segments_page() -> None:
    slots = np.array([1, 0, 1, -1, 1], dtype=np.int32)
    kind = build_segments(slots, np.ones(5, dtype=np.float32), [(4,), (7, 5)])
    (batch,) = kind.batches
    assert isinstance(batch, SegmentBatch)
    assert isinstance(batch.rows, torch.Tensor)
    assert isinstance(batch.pages, torch.Tensor)
    assert isinstance(batch.picks, torch.Tensor)
    assert batch.bags is not None
    assert batch.rows.tolist() == [1, 1, 1, 0, 2, 4, 0, 2, 4]
    assert batch.pages.tolist() == [4, 5, 7]
    assert batch.picks.tolist() == [3, 6, 0, 4, 7, 5, 8]
    assert batch.bags.tolist() == [0, 2, 3, 5]
    assert batch.targets == ((slice(0, 3), slice(0, 3)), (slice(4, 5), slice(3, 4)))


def test_single_rows_of_several_pages_are_summed() -> None:
    """Their lanes lie in row order, yet are no view: two lanes make one row."""
    kind = build_segments(np.array([0, 1], dtype=np.int32), np.ones(2, dtype=np.float32), [(0, 1), (2,)])
    (batch,) = kind.batches
    assert isinstance(batch.picks, torch.Tensor)
    assert batch.picks.tolist() == [0, 1, 2]
    assert batch.bags is not None
    assert batch.bags.tolist() == [0, 2]


def test_consecutive_pages_and_rows_are_views() -> None:
    kind = build_segments(np.array([0, 0, 1, 1], dtype=np.int32), np.ones(4, dtype=np.float32), [(5,), (4,)])
    (batch,) = kind.batches
    assert batch.pages == slice(4, 6)
    assert isinstance(batch.rows, torch.Tensor)
    kind = build_segments(np.array([0, 0, 1, 1], dtype=np.int32), np.ones(4, dtype=np.float32), [(4,), (5,)])
    (batch,) = kind.batches
    assert (batch.rows, batch.picks, batch.bags) == (slice(0, 4), slice(0, 4), None)
    kind = build_segments(np.zeros(40, dtype=np.int32), np.ones(40, dtype=np.float32), [(2, 3)])
    (segment,) = kind.segments
    assert segment.rows == slice(0, 40)
    assert segment.pages == slice(2, 4)
