"""The way of adapters from disk into host memory: a queue for slots, the loads, and who must give way."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

from manylora.adapters.adapter_files import Sight
from manylora.adapters.failures import Failures
from manylora.adapters.lease import Entry, Lease, Order, Stage
from manylora.adapters.load import Loaded
from manylora.adapters.loader import Job, Loader
from manylora.adapters.versions import Versions, no_room
from manylora.adapters.weights import AdapterWeights
from manylora.errors import ManyloraError


class Reported(Protocol):
    """Who wants to know how loads end."""

    def on_loaded(self, entry: Entry) -> None:
        """What new requests get is what the files hold."""

    def on_invalid(self, loaded: Loaded, name: str) -> None:
        """Changed files cannot be served; what was there before goes on being."""

    def on_torn(self, loaded: Loaded, name: str, leases: list[Lease]) -> None:
        """The files must be left alone for a while before they are read. These leases wait for that."""


class Intake:
    """The loads, and the queue of versions that lack a slot.

    A load begins when a thread of the loader is free for it, and takes its slot only then: until it begins it
    can be withdrawn, and whatever comes before it in the order overtakes it. One that stalls gives its slot
    back. A new version of an adapter that is there is read beside the cache, one at a time.

    A slot goes to the adapter whose first lease comes first (`Lease.order`: by priority, then by age).
    Adapters without leases make room first, least recently used first; then those that have only waiting
    leases, all behind that one, which queue again. The scheduler admits in the same order: whoever is first
    in its queue is first here, so the two never wait for each other.
    """

    def __init__(
        self,
        versions: Versions,
        failures: Failures,
        loader: Loader[Loaded],
        load: Callable[[str, Sight], Loaded],
    ) -> None:
        self.num_loads = 0
        self.report: Reported
        """Set by the registry before the first poll."""
        self._versions = versions
        self._host = versions.host
        self._failures = failures
        self._loader = loader
        self._load = load
        self._updates: dict[str, Entry] = {}
        """New versions that are being read, by name."""
        self._followed: dict[Entry, Entry] = {}
        """The version that each of those is to follow."""
        self._reading: dict[Job[Loaded], Entry] = {}
        self._hung: dict[Job[Loaded], str] = {}
        """Reads that have been given up and keep their thread, with the adapters' names."""

    def enter(self, name: str, sight: Sight, leases: Iterable[Lease]) -> None:
        """Queue an absent adapter for those who want it."""
        entry = self._versions.current[name] = Entry(name, sight)
        self._versions.queued[entry] = None
        for lease in leases:
            entry.add(lease)

    def admit(self, entry: Entry, weights: AdapterWeights) -> None:
        """Take in an adapter that was read outside the queue."""
        self._versions.current[entry.name] = entry
        self.num_loads += 1
        self._host.reserve(entry)
        self._versions.fill(entry, weights)

    def try_update(self, name: str, sight: Sight) -> bool:
        """Read a new version of an adapter that is there; False if too much is in the works.

        What is read beside the cache takes memory beyond it. So it is one at a time, and none while as many
        as there are threads wait for a slot; and one thread is left to those who wait for a first load.
        """
        num_waiting = sum(entry.is_update for entry in self._versions.queued)
        if self._updates or num_waiting >= self._loader.num_threads or not self._num_idle:
            return False
        entry = self._updates[name] = Entry(name, sight, is_update=True)
        self._followed[entry] = self._versions.current[name]
        self._begin(entry)
        return True

    def is_updating(self, name: str) -> bool:
        return name in self._updates

    def is_hung(self, name: str) -> bool:
        """Whether a read of the adapter has been given up and keeps its thread."""
        return name in self._hung.values()

    def poll(self) -> None:
        """Take finished loads and start the next ones: as many as the loader has idle threads."""
        for job in self._loader.take():
            self._take(job)
        for job, entry in self._reading.items():
            if job.is_stalled and entry in self._host:
                # Its thread may never come back. Others can use the slot.
                self._host.abandon(entry)
        if not self._versions.queued:
            return
        num_idle = self._num_idle
        for entry in self._in_order():
            if entry.in_hand is None and not num_idle:
                continue
            if not self._make_slot(entry.first):
                break
            self._host.reserve(entry)
            if entry.leases:
                self._host.acquire(entry, len(entry.leases))
            del self._versions.queued[entry]
            if entry.in_hand is not None:
                self._versions.fill(entry, entry.in_hand)
            else:
                num_idle -= 1
                self._begin(entry)
        self._mark_queued()

    def check(self) -> list[str]:
        """Broken invariants of the queue."""
        loading = {entry for entry in self._versions if entry.stage is Stage.LOADING}
        reading = set(self._reading.values())
        wrong = [f"{e} is not being read" for e in loading - reading]
        wrong += [f"{e} is read for nobody" for e in reading - loading - set(self._updates.values())]
        if self._num_reading > self._loader.num_threads:
            wrong.append(f"{self._num_reading} loads have begun, for {self._loader.num_threads} threads")
        if len(self._updates) > 1:
            wrong.append(f"{len(self._updates)} new versions are read at once")
        return wrong

    def _begin(self, entry: Entry) -> None:
        entry.stage = Stage.LOADING
        name, sight = entry.name, entry.sight
        job = Job(name, lambda: self._load(name, sight))
        self._reading[job] = entry
        self._loader.submit(job)

    def _take(self, job: Job[Loaded]) -> None:
        if self._hung.pop(job, None) is not None:
            # Given up long ago; its thread is back.
            return
        entry = self._reading.pop(job)
        if job.is_hung:
            self._hung[job] = entry.name
        loaded = job.value
        if loaded is None or job.is_hung:
            loaded = Loaded(sight=entry.sight, error=job.error)
        if entry.is_update:
            self._finish_update(entry, loaded)
        else:
            self._finish(entry, loaded, was_read=job.value is not None)

    def _finish(self, entry: Entry, loaded: Loaded, *, was_read: bool) -> None:
        weights, error = loaded.weights, loaded.error
        if weights is not None and not self._versions.residents.fits_beside_pinned(weights):
            error = no_room(entry.name)
        if weights is None or error is not None or loaded.is_torn:
            self._give_up(entry, loaded, error, was_read=was_read)
            return
        assert self._versions.current.get(entry.name) is entry, f"{entry} is read for nobody"
        self._failures.forget(entry.name)
        # Files may be put back as they were while sequences still run under that version.
        old = self._versions.find_outdated(entry.name, weights.version)
        if old is not None:
            self._versions.take_back(old, entry)
            old.sight = loaded.sight
            self.report.on_loaded(old)
            return
        self.num_loads += 1
        entry.sight = loaded.sight
        if entry in self._host:
            self._versions.fill(entry, weights)
        elif entry.leases:
            self._versions.hold(entry, weights)
        else:
            del self._versions.current[entry.name]
        self.report.on_loaded(entry)

    def _give_up(self, entry: Entry, loaded: Loaded, error: ManyloraError | None, *, was_read: bool) -> None:
        leases = list(entry.leases.values())
        for lease in leases:
            entry.drop(lease)
        if entry in self._host:
            self._host.abandon(entry)
        del self._versions.current[entry.name]
        if loaded.is_torn:
            self.report.on_torn(loaded, entry.name, leases)
            return
        assert error is not None, "a load without a result"
        if was_read:
            self._failures.remember(entry.name, error, loaded.sight.stamp)
        for lease in leases:
            lease.error = error

    def _finish_update(self, entry: Entry, loaded: Loaded) -> None:
        del self._updates[entry.name]
        current = self._followed.pop(entry)
        if self._versions.current.get(entry.name) is not current or not current.is_whole:
            # It has left the cache meanwhile, or its directory the disk. If it is wanted again, it is read
            # later than this was.
            return
        if loaded.is_torn:
            self.report.on_torn(loaded, entry.name, [])
            return
        weights, error = loaded.weights, loaded.error
        if weights is not None and not self._versions.residents.fits_beside_pinned(weights, without=current):
            error = no_room(entry.name)
        if weights is None or error is not None:
            assert error is not None, "a load without a result"
            self._failures.remember(entry.name, error, loaded.sight.stamp)
            self.report.on_invalid(dataclasses.replace(loaded, error=error), entry.name)
            return
        self._failures.forget(entry.name)
        if weights.version != current.version:
            # Files may be put back as they were while sequences still run under that version.
            found = self._versions.find_outdated(entry.name, weights.version)
            if found is None:
                self.num_loads += 1
                found = entry
                self._versions.hold(entry, weights)
            self._versions.supersede(current, found)
            current = found
        current.sight = loaded.sight
        self.report.on_loaded(current)

    @property
    def _num_reading(self) -> int:
        """Loads that have begun, without those whose thread has a substitute."""
        return sum(not job.is_stalled for job in self._reading)

    @property
    def _num_idle(self) -> int:
        return max(0, self._loader.num_threads - self._num_reading)

    def _in_order(self) -> list[Entry]:
        return sorted(self._versions.queued, key=lambda entry: entry.first)

    def _mark_queued(self) -> None:
        """Find out which of the queue only wait for a thread: as many as `_make_slot` could serve now."""
        behind = sorted(entry.first for entry in self._replaceable())
        num_free = self._host.max_entries - len(self._host) + self._host.num_idle
        for num_before, entry in enumerate(self._in_order()):
            num_slots = num_free + len(behind) - bisect.bisect_right(behind, entry.first)
            entry.lacks_slot = num_before >= num_slots

    def _replaceable(self) -> list[Entry]:
        """Loaded versions with waiting leases only, which may have to give way to those before them."""
        return [
            entry
            for entry in self._versions
            if entry.stage is Stage.READY
            and entry.leases
            and not entry.num_active
            and not self._host[entry].is_pinned
        ]

    def _make_slot(self, order: Order) -> bool:
        """Free a host slot for an adapter whose first lease has this order."""
        if not self._host.is_full or self._versions.try_evict():
            return True
        behind = [entry for entry in self._replaceable() if entry.first > order]
        if not behind:
            return False
        self._versions.displace(max(behind, key=lambda entry: entry.first))
        return True
