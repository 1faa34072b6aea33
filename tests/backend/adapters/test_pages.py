"""Pages are taken and given back without loss, consecutive where that is possible. No torch."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from manylora.adapters.pages import PageAllocator


def test_pages_are_taken_in_order() -> None:
    pages = PageAllocator(8)
    assert [pages.allocate(3), pages.allocate(0), pages.allocate(5)] == [(0, 1, 2), (), (3, 4, 5, 6, 7)]
    assert pages.num_free == 0


def test_the_shortest_run_that_fits_is_used() -> None:
    pages = PageAllocator(10)
    pages.allocate(10)
    for run in ((0, 1, 2, 3), (5, 6), (8,)):
        pages.free(run)
    assert pages.allocate(2) == (5, 6)
    assert pages.allocate(1) == (8,)
    assert pages.allocate(3) == (0, 1, 2)


def test_scattered_pages_are_joined_from_the_longest_runs() -> None:
    pages = PageAllocator(8)
    pages.allocate(8)
    for run in ((0,), (2, 3), (5, 6)):
        pages.free(run)
    assert pages.allocate(3) == (2, 3, 5)
    assert pages.check([1, 2, 3, 4, 5, 7]) == []


def test_misuse_is_an_error() -> None:
    pages = PageAllocator(2)
    with pytest.raises(AssertionError, match="3 pages asked for, 2 free"):
        pages.allocate(3)
    with pytest.raises(AssertionError, match="page 0 was freed twice"):
        pages.free((0,))


def test_check_sees_pages_that_are_lost_or_shared() -> None:
    pages = PageAllocator(4)
    taken = pages.allocate(2)
    assert pages.check(taken) == []
    assert pages.check(taken[:1]) != []
    assert pages.check([*taken, taken[0]]) != []


class Machine(RuleBasedStateMachine):
    """Random takers of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(24)
        self.held: list[tuple[int, ...]] = []

    @rule(count=st.integers(0, 24))
    def take(self, count: int) -> None:
        if count > self.pages.num_free:
            return
        taken = self.pages.allocate(count)
        assert len(taken) == count
        assert list(taken) == sorted(set(taken))
        self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.pages.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.pages.check([page for taken in self.held for page in taken]) == []


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestRandomTakers = Machine.TestCase
