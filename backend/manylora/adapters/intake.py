"""The way of adapters from disk into host memory: a queue for slots, the loads, and who must give way."""

from __future__ import annotations

import bisect
from pathlib import Path

from manylora.adapters.failures import Failures
from manylora.adapters.host_cache import HostCache
from manylora.adapters.lease import Entry, Order, Stage
from manylora.adapters.loader import Loaded, Loader
from manylora.adapters.residents import Residents
from manylora.adapters.weights import AdapterWeights
from manylora.errors import ManyloraError, UnavailableError


class Intake:
    """Every adapter that is neither absent nor failed, and the queue of those whose load has not begun.

    A load begins when a thread of the loader is free for it, and takes its slot only then: until it begins it
    can be withdrawn, and whatever comes before it in the order overtakes it.

    A slot goes to the adapter whose first lease comes first (`Lease.order`: by priority, then by age).
    Adapters without leases make room first, least recently used first; then those that have only waiting
    leases, all behind that one, which queue again. The scheduler admits in the same order: whoever is first
    in its queue is first here, so the two never wait for each other.
    """

    def __init__(
        self, host: HostCache[AdapterWeights], residents: Residents, failures: Failures, loader: Loader
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.num_loads = 0
        self._host = host
        self._residents = residents
        self._failures = failures
        self._loader = loader
        self._queued: dict[str, Entry] = {}

    def enter(self, name: str, directory: Path) -> Entry:
        """Queue an absent adapter. The caller gives it a lease before the next `poll`."""
        entry = self.entries[name] = self._queued[name] = Entry(name, directory)
        return entry

    def withdraw(self, entry: Entry) -> None:
        """Forget a queued adapter that nobody waits for any more."""
        del self._queued[entry.name], self.entries[entry.name]

    def admit(self, entry: Entry, weights: AdapterWeights) -> None:
        """Take in an adapter that was read outside the queue."""
        self.entries[entry.name] = entry
        self._host.reserve(entry.name)
        self._fill(entry, weights)

    def expel(self, entry: Entry) -> None:
        """Drop a loaded adapter, not active, that no longer finds room beside the pinned ones."""
        self._host.release(entry.name, len(entry.leases))
        self._host.evict(entry.name)
        self._leave_device(entry.name)
        del self.entries[entry.name]
        _fail_leases(entry, _no_room(entry.name))

    def poll(self) -> None:
        """Take finished loads and start the next ones: as many as the loader has idle threads."""
        for loaded in self._loader.take():
            self._finish(loaded)
        if not self._queued:
            return
        num_idle = self._loader.num_threads - self._num_loading
        for entry in self._in_order()[:num_idle]:
            if not self._make_slot(entry.first):
                break
            self._host.reserve(entry.name)
            self._host.acquire(entry.name, len(entry.leases))
            entry.stage = Stage.LOADING
            del self._queued[entry.name]
            self._loader.submit(entry.name, entry.directory)
        self._mark_queued()

    def check(self) -> list[str]:
        """Broken invariants of the queue."""
        queued = sorted(name for name, entry in self.entries.items() if entry.stage is Stage.QUEUED)
        wrong = [f"host cache: {name} is not known" for name in self._host if name not in self.entries]
        if queued != sorted(self._queued):
            wrong.append(f"{queued} are queued, but {sorted(self._queued)} are in the queue")
        if self._num_loading > self._loader.num_threads:
            wrong.append(f"{self._num_loading} loads have begun, for {self._loader.num_threads} threads")
        return wrong

    def _finish(self, loaded: Loaded) -> None:
        entry = self.entries[loaded.name]
        assert entry.stage is Stage.LOADING, f"{entry.name} was loaded while {entry.stage}"
        weights, error = loaded.weights, loaded.error
        if weights is not None and not self._residents.fits_beside_pinned(weights):
            error = _no_room(entry.name)
        if weights is None or error is not None:
            assert error is not None, "a load without a result"
            self._failures.remember(entry.name, error)
            self._host.abandon(entry.name)
            del self.entries[entry.name]
            _fail_leases(entry, error)
            return
        self._failures.forget(entry.name)
        self._fill(entry, weights)
        self._fail_outdated(entry, weights)

    def _fill(self, entry: Entry, weights: AdapterWeights) -> None:
        self._host.fill(entry.name, weights)
        entry.weights = weights
        entry.stage = Stage.READY
        self.num_loads += 1

    def _fail_outdated(self, entry: Entry, weights: AdapterWeights) -> None:
        """Tokens of one version must not go on under another."""
        for lease in list(entry.leases.values()):
            if lease.used_version not in ("", weights.version):
                lease.error = UnavailableError(f"adapter {entry.name!r} was replaced during the request")
                lease.entry = None
                entry.drop(lease)
                self._host.release(entry.name)

    @property
    def _num_loading(self) -> int:
        return sum(entry.stage is Stage.LOADING for entry in self.entries.values())

    def _in_order(self) -> list[Entry]:
        return sorted(self._queued.values(), key=lambda entry: entry.first)

    def _mark_queued(self) -> None:
        """Find out which of the queue only wait for a thread: as many as `_make_slot` could serve now."""
        behind = sorted(entry.first for entry in self._replaceable())
        num_free = self._host.max_entries - len(self._host) + self._host.num_idle
        for num_before, entry in enumerate(self._in_order()):
            num_slots = num_free + len(behind) - bisect.bisect_right(behind, entry.first)
            entry.lacks_slot = num_before >= num_slots

    def _replaceable(self) -> list[Entry]:
        """Loaded adapters with waiting leases only, which may have to give way to those before them."""
        return [
            entry
            for entry in self.entries.values()
            if entry.stage is Stage.READY
            and entry.leases
            and not entry.num_active
            and not self._host[entry.name].is_pinned
        ]

    def _make_slot(self, order: Order) -> bool:
        """Free a host slot for an adapter whose first lease has this order."""
        if not self._host.is_full:
            return True
        evicted = self._host.try_evict()
        if evicted is not None:
            self._leave_device(evicted)
            del self.entries[evicted]
            return True
        behind = [entry for entry in self._replaceable() if entry.first > order]
        if not behind:
            return False
        victim = max(behind, key=lambda entry: entry.first)
        self._host.evict(victim.name)
        self._leave_device(victim.name)
        victim.stage = Stage.QUEUED
        victim.weights = None
        victim.lacks_slot = True
        self._queued[victim.name] = victim
        return True

    def _leave_device(self, name: str) -> None:
        if name in self._residents:
            self._residents.drop(name)


def _no_room(name: str) -> UnavailableError:
    return UnavailableError(f"adapter {name!r} has no room in the device pool beside pinned ones")


def _fail_leases(entry: Entry, error: ManyloraError) -> None:
    for lease in entry.leases.values():
        lease.error, lease.entry = error, None
