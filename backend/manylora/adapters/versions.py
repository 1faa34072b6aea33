"""Which versions of which adapters there are: what new requests get, and older ones that sequences end on."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from manylora.adapters.host_cache import HostCache
from manylora.adapters.lease import Entry, Lease, Stage
from manylora.adapters.residents import Residents
from manylora.adapters.weights import AdapterWeights
from manylora.errors import ManyloraError, UnavailableError

log = logging.getLogger(__name__)


class Versions:
    """Every version that is wanted or held. What nobody will ask for again goes with its last lease.

    Args:
        host, residents: both levels, by version.
        pins_due: names that are to be pinned as soon as they can be.
    """

    def __init__(
        self,
        host: HostCache[Entry, AdapterWeights],
        residents: Residents[Entry],
        pins_due: set[str],
    ) -> None:
        self.host = host
        self.residents = residents
        self.pins_due = pins_due
        self.current: dict[str, Entry] = {}
        """What new requests for a name get: its newest whole version, or what a first load will give."""
        self.outdated: dict[Entry, None] = {}
        """Others, each with the leases that end on it."""
        self.queued: dict[Entry, None] = {}
        """Those of either that lack a slot."""

    def __iter__(self) -> Iterator[Entry]:
        yield from self.current.values()
        yield from self.outdated

    def find_outdated(self, name: str, version: str) -> Entry | None:
        """An older version of an adapter that is still held."""
        return next((e for e in self.outdated if e.name == name and e.version == version), None)

    def leave(self, lease: Lease) -> None:
        """End a lease's hold."""
        entry = lease.entry
        assert entry is not None, f"lease {lease.number} holds nothing"
        entry.drop(lease)
        if entry in self.host:
            self.host.release(entry)
        is_unwanted = entry in self.outdated or (entry in self.queued and not entry.is_update)
        if not entry.leases and is_unwanted:
            self.forget(entry)

    def fail(self, lease: Lease, error: ManyloraError) -> None:
        """End a lease with an error."""
        if lease.entry is not None:
            self.leave(lease)
        lease.error = error

    def retire(self, entry: Entry) -> None:
        """Give a version that has been read to no new request."""
        self.unpin(entry)
        del self.current[entry.name]
        self.outdated[entry] = None
        if not entry.leases:
            self.forget(entry)

    def supersede(self, old: Entry, new: Entry) -> None:
        """Let those that have not begun, and all that come, have the new version instead of the old one."""
        assert old.is_whole, f"{old} has not been read"
        log.info("adapter %r: version %s takes the place of %s", new.name, new.version, old.version)
        self.outdated.pop(new, None)
        self.unpin(old)
        moving = [lease for lease in old.leases.values() if not lease.used_version]
        for lease in moving:
            old.drop(lease)
            new.add(lease)
        for entry, move in ((old, self.host.release), (new, self.host.acquire)):
            if moving and entry in self.host:
                move(entry, len(moving))
        self.current[new.name] = new
        if old.leases:
            self.outdated[old] = None
        else:
            self.forget(old)

    def take_back(self, old: Entry, found: Entry) -> None:
        """Let those that wait for what was read, and all that come, have the same version as it is held."""
        leases = list(found.leases.values())
        for lease in leases:
            found.drop(lease)
            old.add(lease)
        if found in self.host:
            self.host.abandon(found)
        if leases and old in self.host:
            self.host.acquire(old, len(leases))
        del self.outdated[old]
        self.current[old.name] = old

    def hold(self, entry: Entry, weights: AdapterWeights) -> None:
        """Keep in hand what has been read, until it has a slot."""
        entry.stage = Stage.QUEUED
        entry.weights, entry.in_hand = None, weights
        entry.lacks_slot = True
        self.queued[entry] = None

    def fill(self, entry: Entry, weights: AdapterWeights) -> None:
        """Put what has been read into its slot."""
        self.host.fill(entry, weights)
        entry.weights, entry.in_hand = weights, None
        entry.is_update = False
        entry.stage = Stage.READY

    def try_evict(self) -> bool:
        """Free the slot of the least recently used version that nobody holds; of one that could not be read
        again only if there is no other."""
        evicted = self.host.try_evict(spare=lambda entry: entry.is_stale)
        if evicted is not None:
            self._leave_device(evicted)
            del self.current[evicted.name]
        return evicted is not None

    def displace(self, entry: Entry) -> None:
        """Take the slot of a version that has waiting leases only, which queues again.

        It is kept in hand where another version must not take its place: sequences have begun under it, or
        its files have changed since.
        """
        weights = entry.weights
        assert weights is not None, f"{entry} is not loaded"
        self.host.evict(entry)
        self._leave_device(entry)
        self.hold(entry, weights)
        was_used = any(lease.used_version for lease in entry.leases.values())
        if not (was_used or entry.is_stale or entry in self.outdated):
            entry.in_hand = None

    def expel(self, entry: Entry) -> None:
        """Drop a version, not active, that no longer finds room beside the pinned ones."""
        for lease in list(entry.leases.values()):
            self.fail(lease, no_room(entry.name))
        if entry in self.host or entry in self.queued:
            self.forget(entry)

    def forget(self, entry: Entry) -> None:
        """Drop a version that has no leases and is not being read."""
        self.outdated.pop(entry, None)
        self.queued.pop(entry, None)
        if self.current.get(entry.name) is entry:
            del self.current[entry.name]
        if entry in self.host:
            self.host.remove(entry)
        self._leave_device(entry)

    def unpin(self, entry: Entry) -> None:
        """Let a version go whose pin is for the one that comes after it."""
        if entry in self.host and self.host[entry].is_pinned:
            self.pins_due.add(entry.name)
            self.host.unpin(entry)
            self.residents[entry].is_pinned = False

    def check(self) -> list[str]:
        """Broken invariants."""
        known = list(self)
        queued = {entry for entry in known if entry.stage is Stage.QUEUED}
        wrong = [f"host cache: {entry} is not known" for entry in self.host if entry not in known]
        wrong += [f"device: {entry} is not on host" for entry in self.residents if entry not in self.host]
        if queued != set(self.queued):
            wrong.append(f"{sorted(map(str, queued))} are queued, not {sorted(map(str, self.queued))}")
        wrong += [f"{n} leads to {e.name}" for n, e in self.current.items() if e.name != n]
        wrong += [f"{e} is outdated and current" for e in self.outdated if self.current.get(e.name) is e]
        wrong += [f"{e} is outdated and nobody holds it" for e in self.outdated if not e.leases]
        wrong += [f"{e} is outdated and was never whole" for e in self.outdated if not e.is_whole]
        names = [(entry.name, entry.version) for entry in known if entry.version]
        if len(names) != len(set(names)):
            wrong.append(f"a version is there twice: {sorted(names)}")
        return wrong

    def _leave_device(self, entry: Entry) -> None:
        if entry in self.residents:
            self.residents.drop(entry)


def no_room(name: str) -> UnavailableError:
    """The error of an adapter for which pinned ones leave too little."""
    return UnavailableError(f"adapter {name!r} has no room in the device pool beside pinned ones")
