"""Which adapters are in the device pool, which of them are in use, and which must go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from manylora.adapters.device_pool import DevicePool, Placement, needed_pages
from manylora.adapters.weights import AdapterWeights

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class Resident:
    """An adapter in the device pool."""

    placement: Placement
    num_uses: int = 0
    """Running sequences that use it."""
    is_pinned: bool = False


class Residents(Generic[K]):
    """The device pool as a cache by key (a version of an adapter), from least to most recently used."""

    def __init__(self, pool: DevicePool) -> None:
        self.pool = pool
        self.num_copies = 0
        self.num_evictions = 0
        self._residents: OrderedDict[K, Resident] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def __getitem__(self, key: K) -> Resident:
        return self._residents[key]

    def get(self, key: K) -> Resident | None:
        return self._residents.get(key)

    def __iter__(self) -> Iterator[K]:
        """Keys, least recently used first."""
        return iter(self._residents)

    def try_place(self, key: K, weights: AdapterWeights) -> bool:
        """Make the adapter resident. Others are evicted only if that makes enough room.

        The least recently used go first, and only those that hold pages of a kind that lacks some.
        """
        if key in self._residents:
            self._residents.move_to_end(key)
            return True
        needed = needed_pages(weights)
        if not self._could_fit(needed):
            return False
        placement = self.pool.try_place(weights)
        for victim in list(self):
            if placement is not None:
                break
            resident = self._residents[victim]
            if _is_idle(resident) and self._relieves(resident.placement, needed):
                self.drop(victim)
                placement = self.pool.try_place(weights)
        assert placement is not None, "room was counted that is not there"
        self._residents[key] = Resident(placement)
        self.num_copies += 1
        return True

    def use(self, key: K) -> None:
        """Count a use: the adapter stays until as many `unuse`."""
        resident = self._residents[key]
        resident.num_uses += 1
        self._residents.move_to_end(key)

    def unuse(self, key: K) -> None:
        resident = self._residents[key]
        assert resident.num_uses > 0, f"{key} is not in use"
        resident.num_uses -= 1
        self._residents.move_to_end(key)

    def drop(self, key: K) -> None:
        """Evict the adapter and give its pages back."""
        resident = self._residents.pop(key)
        assert _is_idle(resident), f"{key} is in use or pinned"
        self.pool.free(resident.placement)
        self.num_evictions += 1

    def pages_beside_pinned(self, weights: AdapterWeights, without: K | None = None) -> list[int]:
        """Pages by kind that are left once only this adapter and the pinned ones are on the device.

        Args:
            without: a pinned one that does not count: this one takes its place.
        """
        left = [self.pool.num_pages - count for count in needed_pages(weights)]
        for key, resident in self._residents.items():
            if resident.is_pinned and key != without:
                left = [n - len(p) for n, p in zip(left, resident.placement.pages, strict=True)]
        return left

    def fits_beside_pinned(self, weights: AdapterWeights, without: K | None = None) -> bool:
        """Whether the adapter ever finds room, however much is evicted."""
        return min(self.pages_beside_pinned(weights, without)) >= 0

    def check(self) -> list[str]:
        """Broken invariants."""
        wrong = [f"device: {n} has {r.num_uses} uses" for n, r in self._residents.items() if r.num_uses < 0]
        wrong += self.pool.check()
        held = [sum(len(r.placement.pages[k]) for r in self._residents.values()) for k in self._kinds()]
        for kind, (count, free) in enumerate(zip(held, self.pool.num_free, strict=True)):
            if count + free != self.pool.num_pages:
                wrong.append(f"device: kind {kind} has {count} pages held and {free} free")
        return wrong

    def _kinds(self) -> range:
        return range(len(self.pool.spec.kinds))

    def _could_fit(self, needed: tuple[int, ...]) -> bool:
        room = list(self.pool.num_free)
        for resident in self._residents.values():
            if _is_idle(resident):
                room = [n + len(p) for n, p in zip(room, resident.placement.pages, strict=True)]
        return all(need <= n for need, n in zip(needed, room, strict=True))

    def _relieves(self, placement: Placement, needed: tuple[int, ...]) -> bool:
        lacks = [need > free for need, free in zip(needed, self.pool.num_free, strict=True)]
        return any(lack and pages for lack, pages in zip(lacks, placement.pages, strict=True))


def _is_idle(resident: Resident) -> bool:
    return not resident.num_uses and not resident.is_pinned
