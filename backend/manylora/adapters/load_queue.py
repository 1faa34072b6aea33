"""How adapters get from disk into host memory: the queue for slots, the loads, and who has to give way."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

from manylora.adapters.adapter import Adapter, Lease, Order, Stage
from manylora.adapters.adapter_files import Sight
from manylora.adapters.failures import Failures
from manylora.adapters.load import Loaded
from manylora.adapters.loader import Job, Loader
from manylora.adapters.versions import Versions, no_room, no_room_at_start
from manylora.errors import ManyloraError


class Reported(Protocol):
    """Learns how loads end."""

    def on_loaded(self, adapter: Adapter) -> None:
        """What new requests get matches the files."""

    def on_invalid(self, loaded: Loaded, name: str) -> None:
        """Changed files cannot be served; the older version stays in service."""

    def on_torn(self, loaded: Loaded, name: str, leases: list[Lease]) -> None:
        """The files are being written and are to be read later. These leases wait for that."""


class LoadQueue:
    """The loads, and the queue of versions that have no slot in the host cache.

    A load begins when the loader has a free thread for it, and gets its slot only then: until it begins it
    can be withdrawn, and whatever comes earlier in the order overtakes it. A load that stalls gives its slot
    back. A new version of a loaded adapter is read beside the cache, one at a time.

    A slot goes to the adapter whose first lease comes first (`Lease.order`: by priority, then by age).
    Adapters without leases make room first, least recently used first; then those that have only waiting
    leases, all later in the order, which queue again. The scheduler admits in the same order: whoever is
    first in its queue is first here, so the two never wait for each other.
    """

    def __init__(
        self,
        versions: Versions,
        failures: Failures,
        loader: Loader[Loaded],
        load: Callable[[str, Sight], Loaded],
    ) -> None:
        self.num_loads = 0
        self.is_preloading = False
        """Nothing is served yet: an adapter without room is a mistake in the settings."""
        self.report: Reported
        """Set by the registry before the first poll."""
        self._versions = versions
        self._host = versions.host
        self._failures = failures
        self._loader = loader
        self._load = load
        self._update: tuple[Adapter, Adapter] | None = None
        """The new version that is being read, and the one that it is to follow."""
        self._reading: dict[Job[Loaded], Adapter] = {}
        self._hung: dict[Job[Loaded], str] = {}
        """Reads that have failed as hung and still occupy their thread, with the adapters' names."""

    def enter(self, name: str, sight: Sight, leases: Iterable[Lease]) -> None:
        """Queue an absent adapter for the leases that wait for it."""
        adapter = self._versions.current[name] = Adapter(name, sight)
        self._versions.queued[adapter] = None
        for lease in leases:
            adapter.add(lease)

    def try_update(self, name: str, sight: Sight) -> bool:
        """Read a new version of a loaded adapter; False if that has to wait.

        A version that is read beside the cache needs memory beyond it. So there is one such read at a time,
        and none while as many updates wait for a slot as there are threads; nor does it begin when no thread
        is idle.
        """
        num_waiting = sum(adapter.is_update for adapter in self._versions.queued)
        if self._update is not None or num_waiting >= self._loader.num_threads or not self._num_idle:
            return False
        adapter = Adapter(name, sight, is_update=True)
        self._update = adapter, self._versions.current[name]
        self._begin(adapter)
        return True

    def is_updating(self, name: str) -> bool:
        return self._update is not None and self._update[0].name == name

    def is_hung(self, name: str) -> bool:
        """Whether a read of the adapter has failed as hung and still occupies its thread."""
        return name in self._hung.values()

    def poll(self) -> None:
        """Process loads that have ended and start the next ones: as many as the loader has idle threads."""
        for job in self._loader.drain():
            self._end(job)
        for job, adapter in self._reading.items():
            if job.is_stalled and adapter in self._host:
                # Its thread may never return. Others can use the slot.
                self._host.remove(adapter)
        if not self._versions.queued:
            return
        num_idle = self._num_idle
        for adapter in self._in_order():
            if adapter.weights is None and not num_idle:
                continue
            if not self._make_slot(adapter.first):
                break
            self._host.reserve(adapter)
            del self._versions.queued[adapter]
            if adapter.weights is not None:
                self._versions.fill(adapter, adapter.weights)
            else:
                num_idle -= 1
                self._begin(adapter)
        self._mark_queued()

    def check(self) -> list[str]:
        """Broken invariants of the queue."""
        loading = {adapter for adapter in self._versions if adapter.stage is Stage.LOADING}
        reading = set(self._reading.values())
        wrong = [f"{e} is not being read" for e in loading - reading]
        wrong += [f"{e} is read for nobody" for e in reading - loading - set((self._update or ())[:1])]
        if self._num_reading > self._loader.num_threads:
            wrong.append(f"{self._num_reading} loads have begun, for {self._loader.num_threads} threads")
        if sum(adapter.is_update for adapter in reading) != (self._update is not None):
            wrong.append(f"{sum(adapter.is_update for adapter in reading)} new versions are being read")
        return wrong

    def _begin(self, adapter: Adapter) -> None:
        adapter.stage = Stage.LOADING
        name, sight = adapter.name, adapter.sight
        job = Job(name, lambda: self._load(name, sight))
        self._reading[job] = adapter
        self._loader.submit(job)

    def _end(self, job: Job[Loaded]) -> None:
        if self._hung.pop(job, None) is not None:
            # It failed long ago; now its thread has returned.
            return
        adapter = self._reading.pop(job)
        if job.is_hung:
            self._hung[job] = adapter.name
        loaded = job.value
        if loaded is None or job.is_hung:
            loaded = Loaded(sight=adapter.sight, error=job.error)
        if adapter.is_update:
            self._finish_update(adapter, loaded)
        else:
            self._finish(adapter, loaded, was_read=job.value is not None)

    def _finish(self, adapter: Adapter, loaded: Loaded, *, was_read: bool) -> None:
        weights, error = loaded.weights, loaded.error
        if weights is not None and not self._versions.residents.fits_beside_pinned(weights):
            error = no_room_at_start(adapter.name) if self.is_preloading else no_room(adapter.name)
        if weights is None or error is not None or loaded.is_torn:
            self._give_up(adapter, loaded, error, was_read=was_read)
            return
        assert self._versions.current.get(adapter.name) is adapter, f"{adapter} is read for nobody"
        self._failures.forget(adapter.name)
        # Files may be put back as they were while sequences still run under that version.
        old = self._versions.find_outdated(adapter.name, weights.version)
        if old is not None:
            self._versions.reinstate(old, adapter)
            old.sight = loaded.sight
            self.report.on_loaded(old)
            return
        self.num_loads += 1
        adapter.sight = loaded.sight
        if adapter in self._host:
            self._versions.fill(adapter, weights)
        elif adapter.leases:
            self._versions.hold(adapter, weights)
        else:
            del self._versions.current[adapter.name]
        self.report.on_loaded(adapter)

    def _give_up(
        self, adapter: Adapter, loaded: Loaded, error: ManyloraError | None, *, was_read: bool
    ) -> None:
        leases = list(adapter.leases.values())
        for lease in leases:
            adapter.drop(lease)
        if adapter in self._host:
            self._host.remove(adapter)
        del self._versions.current[adapter.name]
        if loaded.is_torn:
            self.report.on_torn(loaded, adapter.name, leases)
            return
        assert error is not None, "a load without a result"
        if was_read:
            self._failures.remember(adapter.name, error, loaded.sight.stamp)
        for lease in leases:
            lease.error = error

    def _finish_update(self, adapter: Adapter, loaded: Loaded) -> None:
        assert self._update is not None, f"{adapter} is not the update that is being read"
        _, current = self._update
        self._update = None
        if self._versions.current.get(adapter.name) is not current or not current.is_whole:
            # It has left the cache meanwhile, or its directory the disk. If it is wanted again, it is read
            # anew.
            return
        if loaded.is_torn:
            self.report.on_torn(loaded, adapter.name, [])
            return
        weights, error = loaded.weights, loaded.error
        if weights is not None and not self._versions.residents.fits_beside_pinned(weights, without=current):
            error = no_room(adapter.name)
        if weights is None or error is not None:
            assert error is not None, "a load without a result"
            self._failures.remember(adapter.name, error, loaded.sight.stamp)
            self.report.on_invalid(dataclasses.replace(loaded, error=error), adapter.name)
            return
        self._failures.forget(adapter.name)
        if weights.version != current.version:
            # Files may be put back as they were while sequences still run under that version.
            found = self._versions.find_outdated(adapter.name, weights.version)
            if found is None:
                self.num_loads += 1
                found = adapter
                self._versions.hold(adapter, weights)
            self._versions.supersede(current, found)
            current = found
        current.sight = loaded.sight
        self.report.on_loaded(current)

    @property
    def _num_reading(self) -> int:
        """Loads that have begun, except those whose thread has been replaced."""
        return sum(not job.is_stalled for job in self._reading)

    @property
    def _num_idle(self) -> int:
        return max(0, self._loader.num_threads - self._num_reading)

    def _in_order(self) -> list[Adapter]:
        return sorted(self._versions.queued, key=lambda adapter: adapter.first)

    def _mark_queued(self) -> None:
        """Mark those that lack a slot; the others, as many as `_make_slot` could serve now, only wait for a
        thread."""
        behind = sorted(adapter.first for adapter in self._replaceable())
        num_free = self._host.max_entries - len(self._host) + self._host.num_idle
        for num_before, adapter in enumerate(self._in_order()):
            num_slots = num_free + len(behind) - bisect.bisect_right(behind, adapter.first)
            adapter.lacks_slot = num_before >= num_slots

    def _replaceable(self) -> list[Adapter]:
        """Loaded versions with waiting leases only: they may have to give way to earlier ones."""
        return [
            adapter
            for adapter in self._versions
            if adapter.stage is Stage.READY
            and adapter.leases
            and not adapter.num_active
            and not adapter.is_pinned
        ]

    def _make_slot(self, order: Order) -> bool:
        """Free a host slot for an adapter whose first lease has this order."""
        if not self._host.is_full or self._versions.try_evict():
            return True
        behind = [adapter for adapter in self._replaceable() if adapter.first > order]
        if not behind:
            return False
        self._versions.displace(max(behind, key=lambda adapter: adapter.first))
        return True
