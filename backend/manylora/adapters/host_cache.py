"""Adapters in host memory: at most so many, least recently used first out. Plain Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class Slot(Generic[V]):
    """One place of the cache. Reserved until `value` is filled in."""

    value: V | None = None
    num_refs: int = 0
    is_pinned: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether nobody would miss it."""
        return self.value is not None and not self.num_refs and not self.is_pinned


class HostCache(Generic[K, V]):
    """`max_entries` slots by key (a version of an adapter), from the least to the most recently used.

    A slot is reserved before its adapter is read, so that memory is never over the limit. A slot that is
    being read, is pinned or has references is not evicted by `try_evict`.
    """

    def __init__(self, max_entries: int) -> None:
        assert max_entries > 0, "a host cache without slots"
        self.max_entries = max_entries
        self.num_evictions = 0
        self._slots: OrderedDict[K, Slot[V]] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[K]:
        """Keys, least recently used first."""
        return iter(self._slots)

    def __getitem__(self, key: K) -> Slot[V]:
        return self._slots[key]

    def get(self, key: K) -> Slot[V] | None:
        return self._slots.get(key)

    @property
    def is_full(self) -> bool:
        return len(self._slots) >= self.max_entries

    @property
    def num_pinned(self) -> int:
        return sum(slot.is_pinned for slot in self._slots.values())

    @property
    def num_idle(self) -> int:
        """Adapters that `try_evict` could drop."""
        return sum(slot.is_idle for slot in self._slots.values())

    def reserve(self, key: K) -> None:
        """Take a free slot for an adapter that is about to be read."""
        assert not self.is_full, "no free slot in the host cache"
        assert key not in self._slots, f"{key} has a slot already"
        self._slots[key] = Slot()

    def fill(self, key: K, value: V) -> None:
        """Put the adapter into its reserved slot."""
        slot = self._slots[key]
        assert slot.value is None, f"the slot of {key} is filled already"
        slot.value = value
        self._slots.move_to_end(key)

    def acquire(self, key: K, count: int = 1) -> None:
        """Count references and mark the slot as just used."""
        self._slots[key].num_refs += count
        self._slots.move_to_end(key)

    def release(self, key: K, count: int = 1) -> None:
        """Give references back and mark the slot as just used."""
        slot = self._slots[key]
        assert slot.num_refs >= count, f"{key} was released once too often"
        slot.num_refs -= count
        self._slots.move_to_end(key)

    def pin(self, key: K) -> None:
        """Keep the adapter until `unpin`."""
        assert self._slots[key].value is not None, f"{key} is not loaded"
        self._slots[key].is_pinned = True

    def unpin(self, key: K) -> None:
        self._slots[key].is_pinned = False

    def try_evict(self, spare: Callable[[K], bool] = lambda _: False) -> K | None:
        """Drop the least recently used adapter that nobody refers to; its key, or None if there is none.

        Args:
            spare: those that go only when no other can.
        """
        idle = [key for key, slot in self._slots.items() if slot.is_idle]
        key = next((key for key in idle if not spare(key)), idle[0] if idle else None)
        if key is not None:
            del self._slots[key]
            self.num_evictions += 1
        return key

    def evict(self, key: K) -> None:
        """Drop an adapter that its references can do without."""
        self.remove(key)
        self.num_evictions += 1

    def remove(self, key: K) -> None:
        """Drop an adapter that nobody will ask for again."""
        slot = self._slots[key]
        assert slot.value is not None, f"{key} is being read"
        assert not slot.is_pinned, f"{key} is pinned"
        del self._slots[key]

    def abandon(self, key: K) -> None:
        """Give back a slot whose adapter could not be read."""
        assert self._slots[key].value is None, f"{key} is loaded"
        del self._slots[key]

    def check(self) -> list[str]:
        """Broken invariants."""
        wrong = []
        if len(self._slots) > self.max_entries:
            wrong.append(f"host cache: {len(self._slots)} of {self.max_entries} slots are taken")
        for key, slot in self._slots.items():
            if slot.num_refs < 0:
                wrong.append(f"host cache: {key} has {slot.num_refs} references")
            if slot.is_pinned and slot.value is None:
                wrong.append(f"host cache: {key} is pinned but not loaded")
        return wrong
