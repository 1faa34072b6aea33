"""The host cache drops what nobody uses, the least recently used first. No torch."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from manylora.adapters.host_cache import HostCache


def filled(*names: str, max_entries: int = 3) -> HostCache[str, str]:
    cache: HostCache[str, str] = HostCache(max_entries)
    for name in names:
        cache.reserve(name)
        cache.fill(name, name.upper())
    return cache


def test_the_least_recently_used_goes_first() -> None:
    cache = filled("a", "b", "c")
    cache.acquire("a")
    cache.release("a")
    assert [cache.try_evict() for _ in range(4)] == ["b", "c", "a", None]
    assert cache.num_evictions == 3


def test_what_is_used_pinned_or_being_read_stays() -> None:
    cache = filled("a", "b")
    cache.reserve("c")
    cache.acquire("a")
    cache.pin("b")
    assert cache.is_full
    assert cache.try_evict() is None
    cache.unpin("b")
    assert cache.try_evict() == "b"
    assert cache.check() == []


def test_a_slot_whose_adapter_cannot_be_read_is_given_back() -> None:
    cache = filled()
    cache.reserve("a")
    cache.abandon("a")
    assert len(cache) == 0
    assert cache.num_evictions == 0


def test_misuse_is_an_error() -> None:
    cache = filled("a", max_entries=1)
    with pytest.raises(AssertionError, match="no free slot"):
        cache.reserve("b")
    with pytest.raises(AssertionError, match="a was released once too often"):
        cache.release("a")
    with pytest.raises(AssertionError, match="a is loaded"):
        cache.abandon("a")
    cache.pin("a")
    with pytest.raises(AssertionError, match="a is pinned"):
        cache.evict("a")
    with pytest.raises(AssertionError, match="without slots"):
        HostCache(0)


NAMES = st.sampled_from("abcdef")


class Machine(RuleBasedStateMachine):
    """Random use against a model: a list from least to most recently used."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: HostCache[str, str] = HostCache(3)
        self.order: list[str] = []
        self.refs: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.reading: set[str] = set()

    def touch(self, name: str) -> None:
        self.order.remove(name)
        self.order.append(name)

    @rule(name=NAMES)
    def reserve(self, name: str) -> None:
        if name not in self.order and len(self.order) < 3:
            self.cache.reserve(name)
            self.order.append(name)
            self.refs[name] = 0
            self.reading.add(name)

    @rule(name=NAMES, is_sound=st.booleans())
    def finish(self, name: str, is_sound: bool) -> None:
        if name not in self.reading:
            return
        self.reading.remove(name)
        if is_sound:
            self.cache.fill(name, name)
            self.touch(name)
        else:
            self.cache.abandon(name)
            self.order.remove(name)

    @rule(name=NAMES)
    def acquire(self, name: str) -> None:
        if name in self.order:
            self.cache.acquire(name)
            self.refs[name] += 1
            self.touch(name)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        if name in self.order and self.refs[name]:
            self.cache.release(name)
            self.refs[name] -= 1
            self.touch(name)

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        if name in self.order and name not in self.reading:
            self.cache.pin(name)
            self.pinned.add(name)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        if name in self.order:
            self.cache.unpin(name)
            self.pinned.discard(name)

    @rule()
    def evict(self) -> None:
        free = [n for n in self.order if not self.refs[n] and n not in self.pinned | self.reading]
        evicted = self.cache.try_evict()
        assert evicted == (free[0] if free else None)
        if evicted is not None:
            self.order.remove(evicted)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.cache.check() == []
        assert list(self.cache) == self.order
        assert self.cache.is_full == (len(self.order) == 3)
        assert self.cache.num_pinned == len(self.pinned)


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestRandomUse = Machine.TestCase
