"""Which adapters are in the device pool, which of them are in use, and which must go first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from manylora.adapters.device_pool import DevicePool, Placement, needed_pages
from manylora.adapters.weights import AdapterWeights


@dataclass(slots=True)
class Resident:
    """An adapter in the device pool."""

    placement: Placement
    num_uses: int = 0
    """Running sequences that use it."""
    is_pinned: bool = False


class Residents:
    """The device pool as a cache by name, ordered from the least to the most recently used."""

    def __init__(self, pool: DevicePool) -> None:
        self.pool = pool
        self.num_copies = 0
        self.num_evictions = 0
        self._residents: OrderedDict[str, Resident] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def __getitem__(self, name: str) -> Resident:
        return self._residents[name]

    def get(self, name: str) -> Resident | None:
        return self._residents.get(name)

    def names(self) -> list[str]:
        """Least recently used first."""
        return list(self._residents)

    def try_place(self, name: str, weights: AdapterWeights) -> bool:
        """Make the adapter resident. Others are evicted only if that makes enough room.

        The least recently used go first, and only those that hold pages of a kind that lacks some.
        """
        if name in self._residents:
            self._residents.move_to_end(name)
            return True
        needed = needed_pages(weights)
        if not self._could_fit(needed):
            return False
        placement = self.pool.try_place(weights)
        for victim in self.names():
            if placement is not None:
                break
            resident = self._residents[victim]
            if _is_idle(resident) and self._relieves(resident.placement, needed):
                self.drop(victim)
                placement = self.pool.try_place(weights)
        assert placement is not None, "room was counted that is not there"
        self._residents[name] = Resident(placement)
        self.num_copies += 1
        return True

    def use(self, name: str) -> None:
        """Count a use: the adapter stays until as many `unuse`."""
        resident = self._residents[name]
        resident.num_uses += 1
        self._residents.move_to_end(name)

    def unuse(self, name: str) -> None:
        resident = self._residents[name]
        assert resident.num_uses > 0, f"{name} is not in use"
        resident.num_uses -= 1
        self._residents.move_to_end(name)

    def drop(self, name: str) -> None:
        """Evict the adapter and give its pages back."""
        resident = self._residents.pop(name)
        assert _is_idle(resident), f"{name} is in use or pinned"
        self.pool.free(resident.placement)
        self.num_evictions += 1

    def pages_beside_pinned(self, weights: AdapterWeights) -> list[int]:
        """Pages by kind that are left once only this adapter and the pinned ones are on the device."""
        left = [self.pool.num_pages - count for count in needed_pages(weights)]
        for resident in self._residents.values():
            if resident.is_pinned:
                left = [n - len(p) for n, p in zip(left, resident.placement.pages, strict=True)]
        return left

    def fits_beside_pinned(self, weights: AdapterWeights) -> bool:
        """Whether the adapter ever finds room, however much is evicted."""
        return min(self.pages_beside_pinned(weights)) >= 0

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
