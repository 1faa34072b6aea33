"""The host cache drops what nobody uses, the least recently used first."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from manylora.adapters.adapter import Adapter, Lease, Stage
from manylora.adapters.adapter_files import Sight
from manylora.adapters.host_cache import HostCache

SIGHT = Sight(Path(), ((), ()), 0.0)


class Bench:
    """A cache, and adapters by name."""

    def __init__(self, *names: str, max_entries: int = 3) -> None:
        self.cache = HostCache(max_entries)
        self.adapters: dict[str, Adapter] = {}
        self._numbers = itertools.count()
        for name in names:
            self.reserve(name)
            self.fill(name)

    def reserve(self, name: str) -> None:
        adapter = self.adapters[name] = Adapter(name, SIGHT, Stage.LOADING)
        self.cache.reserve(adapter)

    def fill(self, name: str) -> None:
        self.adapters[name].stage = Stage.READY
        self.cache.touch(self.adapters[name])

    def give_back(self, name: str) -> None:
        self.cache.remove(self.adapters.pop(name))

    def acquire(self, name: str) -> Lease:
        lease = Lease(next(self._numbers), name)
        self.adapters[name].add(lease)
        self.cache.touch(self.adapters[name])
        return lease

    def release(self, lease: Lease) -> None:
        assert lease.adapter is not None
        adapter = lease.adapter
        adapter.drop(lease)
        self.cache.touch(adapter)

    def evict(self) -> str | None:
        evicted = self.cache.try_evict()
        if evicted is None:
            return None
        del self.adapters[evicted.name]
        return evicted.name


def test_the_least_recently_used_goes_first() -> None:
    bench = Bench("a", "b", "c")
    bench.release(bench.acquire("a"))
    assert [bench.evict() for _ in range(4)] == ["b", "c", "a", None]
    assert bench.cache.num_evictions == 3


def test_what_cannot_be_read_again_goes_last() -> None:
    bench = Bench("a", "b", "c")
    bench.adapters["a"].is_stale = True
    assert [bench.evict() for _ in range(4)] == ["b", "c", "a", None]


def test_what_is_used_pinned_or_being_read_stays() -> None:
    bench = Bench("a", "b")
    bench.reserve("c")
    bench.acquire("a")
    bench.adapters["b"].is_pinned = True
    assert bench.cache.is_full
    assert bench.evict() is None
    bench.adapters["b"].is_pinned = False
    assert bench.evict() == "b"
    assert bench.cache.check() == []


def test_a_slot_whose_adapter_cannot_be_read_is_given_back() -> None:
    bench = Bench()
    bench.reserve("a")
    bench.give_back("a")
    assert len(bench.cache) == 0
    assert bench.cache.num_evictions == 0


def test_misuse_is_an_error() -> None:
    bench = Bench("a", max_entries=1)
    with pytest.raises(AssertionError, match="no free slot"):
        bench.reserve("b")
    bench.adapters["a"].is_pinned = True
    with pytest.raises(AssertionError, match="a is pinned"):
        bench.cache.evict(bench.adapters["a"])
    with pytest.raises(AssertionError, match="without slots"):
        HostCache(0)
    bench = Bench("a")
    with pytest.raises(AssertionError, match="a has a slot already"):
        bench.cache.reserve(bench.adapters["a"])


NAMES = st.sampled_from("abcdef")


class Machine(RuleBasedStateMachine):
    """Random use against a model: a list from least to most recently used."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.order: list[str] = []
        self.leases: dict[str, list[Lease]] = {}
        self.pinned: set[str] = set()
        self.reading: set[str] = set()

    def touch(self, name: str) -> None:
        self.order.remove(name)
        self.order.append(name)

    @rule(name=NAMES)
    def reserve(self, name: str) -> None:
        if name not in self.order and len(self.order) < 3:
            self.bench.reserve(name)
            self.order.append(name)
            self.leases[name] = []
            self.reading.add(name)

    @rule(name=NAMES, is_sound=st.booleans())
    def finish(self, name: str, is_sound: bool) -> None:
        if name not in self.reading:
            return
        self.reading.remove(name)
        if is_sound:
            self.bench.fill(name)
            self.touch(name)
        else:
            self.bench.give_back(name)
            self.order.remove(name)

    @rule(name=NAMES)
    def acquire(self, name: str) -> None:
        if name in self.order:
            self.leases[name].append(self.bench.acquire(name))
            self.touch(name)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        if name in self.order and self.leases[name]:
            self.bench.release(self.leases[name].pop())
            self.touch(name)

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        if name in self.order and name not in self.reading:
            self.bench.adapters[name].is_pinned = True
            self.pinned.add(name)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        if name in self.order:
            self.bench.adapters[name].is_pinned = False
            self.pinned.discard(name)

    @rule()
    def evict(self) -> None:
        free = [n for n in self.order if not self.leases[n] and n not in self.pinned | self.reading]
        evicted = self.bench.evict()
        assert evicted == (free[0] if free else None)
        if evicted is not None:
            self.order.remove(evicted)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.bench.cache.check() == []
        assert [adapter.name for adapter in self.bench.cache] == self.order
        assert self.bench.cache.is_full == (len(self.order) == 3)
        assert self.bench.cache.num_pinned == len(self.pinned)


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestRandomUse = Machine.TestCase
