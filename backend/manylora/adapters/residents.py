"""Which adapters are in the device pool, and in which order they are evicted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from manylora.adapters.adapter import Adapter
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.placement import Placement

if TYPE_CHECKING:
    from manylora.adapters.weights import AdapterWeights


class Residents:
    """The device pool as a cache of adapters, from the least to the most recently used."""

    def __init__(self, pool: DevicePool) -> None:
        self.pool = pool
        self.num_copies = 0
        self.num_evictions = 0
        self._order: OrderedDict[Adapter, None] = OrderedDict()

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Adapter]:
        """Least recently used first."""
        return iter(self._order)

    def try_place(self, adapter: Adapter) -> bool:
        """Make an adapter resident. Others are evicted only if that frees enough pages.

        The least recently used go first, and only those that hold pages of a group that is short of them.
        """
        assert adapter.weights is not None, f"{adapter} is not loaded"
        if adapter in self._order:
            self._order.move_to_end(adapter)
            return True
        needed = adapter.weights.num_pages
        if not self._could_fit(needed):
            return False
        placement = self.pool.try_place(adapter.weights)
        for victim in list(self):
            if placement is not None:
                break
            if _is_idle(victim) and self._relieves(_pages(victim), needed):
                self.drop(victim)
                placement = self.pool.try_place(adapter.weights)
        assert placement is not None, "room was counted that is not there"
        adapter.placement = placement
        self._order[adapter] = None
        self.num_copies += 1
        return True

    def use(self, adapter: Adapter) -> None:
        """Count an active lease: the adapter stays until as many `unuse`."""
        adapter.num_active += 1
        self._order.move_to_end(adapter)

    def unuse(self, adapter: Adapter) -> None:
        """End an active lease."""
        assert adapter.num_active > 0, f"{adapter} is not in use"
        adapter.num_active -= 1
        self._order.move_to_end(adapter)

    def drop(self, adapter: Adapter) -> None:
        """Evict an adapter, if it is resident, and free its pages."""
        if adapter not in self._order:
            return
        assert _is_idle(adapter), f"{adapter} is in use or pinned"
        del self._order[adapter]
        self.pool.free(_placement(adapter))
        adapter.placement = None
        self.num_evictions += 1

    def pages_beside_pinned(self, weights: AdapterWeights, without: Adapter | None = None) -> list[int]:
        """Pages by group that are left once only this adapter and the pinned ones are on the device.

        Args:
            without: a pinned one that does not count, since this one replaces it.
        """
        left = [total - count for total, count in zip(self.pool.max_pages, weights.num_pages, strict=True)]
        for adapter in self._order:
            if adapter.is_pinned and adapter is not without:
                left = [n - len(p) for n, p in zip(left, _pages(adapter), strict=True)]
        return left

    def fits_beside_pinned(self, weights: AdapterWeights, without: Adapter | None = None) -> bool:
        """Whether the adapter fits once everything else but the pinned ones is evicted."""
        return min(self.pages_beside_pinned(weights, without)) >= 0

    def leaves_room_beside_pinned(self, weights: AdapterWeights) -> bool:
        """Whether the largest adapter finds room beside this one and the pinned ones."""
        left = self.pages_beside_pinned(weights)
        return all(count >= need for count, need in zip(left, self.pool.largest_pages, strict=True))

    def check(self) -> list[str]:
        """Broken invariants."""
        wrong = [f"device: {adapter} has no pages" for adapter in self._order if adapter.placement is None]
        wrong += self.pool.check()
        for group, free in enumerate(self.pool.num_free):
            held = sum(
                len(_pages(adapter)[group]) for adapter in self._order if adapter.placement is not None
            )
            if held + free != self.pool.max_pages[group]:
                wrong.append(f"device: group {group} has {held} pages held and {free} free")
        return wrong

    def _could_fit(self, needed: tuple[int, ...]) -> bool:
        room = list(self.pool.num_free)
        for adapter in self._order:
            if _is_idle(adapter):
                room = [n + len(p) for n, p in zip(room, _pages(adapter), strict=True)]
        return all(need <= n for need, n in zip(needed, room, strict=True))

    def _relieves(self, held: tuple[tuple[int, ...], ...], needed: tuple[int, ...]) -> bool:
        lacks = [need > free for need, free in zip(needed, self.pool.num_free, strict=True)]
        return any(lack and pages for lack, pages in zip(lacks, held, strict=True))


def _is_idle(adapter: Adapter) -> bool:
    return not adapter.num_active and not adapter.is_pinned


def _placement(adapter: Adapter) -> Placement:
    assert adapter.placement is not None, f"{adapter} is not resident"
    return adapter.placement


def _pages(adapter: Adapter) -> tuple[tuple[int, ...], ...]:
    return _placement(adapter).pages
