"""Adapters in host memory: a limited number, least recently used first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from manylora.adapters.adapter import Adapter


class HostCache:
    """`max_entries` adapters, from the least to the most recently used.

    An adapter gets its slot before it is read, so memory never exceeds the limit. `try_evict` drops none that
    is being read, is pinned or has leases.
    """

    def __init__(self, max_entries: int) -> None:
        assert max_entries > 0, "a host cache without slots"
        self.max_entries = max_entries
        self.num_evictions = 0
        self._order: OrderedDict[Adapter, None] = OrderedDict()

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Adapter]:
        """Least recently used first."""
        return iter(self._order)

    @property
    def is_full(self) -> bool:
        return len(self._order) >= self.max_entries

    @property
    def num_pinned(self) -> int:
        return sum(adapter.is_pinned for adapter in self._order)

    @property
    def num_idle(self) -> int:
        """Adapters that `try_evict` could drop."""
        return sum(adapter.is_idle for adapter in self._order)

    def reserve(self, adapter: Adapter) -> None:
        """Give a free slot to an adapter that is about to be read."""
        assert not self.is_full, "no free slot in the host cache"
        assert adapter not in self._order, f"{adapter} has a slot already"
        self._order[adapter] = None

    def touch(self, adapter: Adapter) -> None:
        """Mark an adapter as just used, if it has a slot."""
        if adapter in self._order:
            self._order.move_to_end(adapter)

    def try_evict(self) -> Adapter | None:
        """Drop and return the least recently used adapter that nobody holds; None if there is none.

        One that could not be read again, since its files have changed, goes only when no other can.
        """
        idle = [adapter for adapter in self._order if adapter.is_idle]
        found = next((adapter for adapter in idle if not adapter.is_stale), idle[0] if idle else None)
        if found is not None:
            self.evict(found)
        return found

    def evict(self, adapter: Adapter) -> None:
        """Drop an adapter to make room for another one."""
        self.remove(adapter)
        self.num_evictions += 1

    def remove(self, adapter: Adapter) -> None:
        """Free the slot of an adapter that nobody will request again, or that could not be read."""
        assert not adapter.is_pinned, f"{adapter} is pinned"
        del self._order[adapter]

    def check(self) -> list[str]:
        """Broken invariants."""
        wrong = []
        if len(self._order) > self.max_entries:
            wrong.append(f"host cache: {len(self._order)} of {self.max_entries} slots are taken")
        return wrong
