"""The versions of all adapters: what new requests get, and older ones on which sequences end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from manylora.adapters.adapter import Adapter, Lease, Stage
from manylora.adapters.host_cache import HostCache
from manylora.adapters.residents import Residents
from manylora.errors import InvalidArgumentError, ManyloraError, UnavailableError

if TYPE_CHECKING:
    from manylora.adapters.weights import AdapterWeights

log = logging.getLogger(__name__)


class Versions:
    """Every version that is wanted or held. One that no new request will get goes with its last lease.

    Args:
        host, residents: both levels of the cache.
        pins_due: names to be pinned as soon as possible.
    """

    def __init__(
        self,
        host: HostCache,
        residents: Residents,
        pins_due: set[str],
    ) -> None:
        self.host = host
        self.residents = residents
        self.pins_due = pins_due
        self.current: dict[str, Adapter] = {}
        """What new requests for a name get: its newest whole version, or the one that its first load will
        give."""
        self.outdated: dict[Adapter, None] = {}
        """Older versions, each with the leases that end on it."""
        self.queued: dict[Adapter, None] = {}
        """Versions of both kinds that have no slot."""

    def __iter__(self) -> Iterator[Adapter]:
        yield from self.current.values()
        yield from self.outdated

    def find_outdated(self, name: str, version: str) -> Adapter | None:
        """The outdated version of an adapter with this hash, if it is still held."""
        return next((e for e in self.outdated if e.name == name and e.version == version), None)

    def leave(self, lease: Lease) -> None:
        """Remove a lease from its version."""
        adapter = lease.adapter
        assert adapter is not None, f"lease {lease.number} holds nothing"
        adapter.drop(lease)
        self.host.touch(adapter)
        is_unwanted = adapter in self.outdated or (adapter in self.queued and not adapter.is_update)
        if not adapter.leases and is_unwanted:
            self.forget(adapter)

    def fail(self, lease: Lease, error: ManyloraError) -> None:
        """Fail a lease."""
        if lease.adapter is not None:
            self.leave(lease)
        lease.error = error

    def retire(self, adapter: Adapter) -> None:
        """Stop giving a version to new requests."""
        self.unpin(adapter)
        del self.current[adapter.name]
        self.outdated[adapter] = None
        if not adapter.leases:
            self.forget(adapter)

    def supersede(self, old: Adapter, new: Adapter) -> None:
        """Move leases that have not begun, and all new ones, from the old version to the new one."""
        assert old.is_whole, f"{old} has not been read"
        log.info("adapter %r: version %s takes the place of %s", new.name, new.version, old.version)
        self.outdated.pop(new, None)
        self.unpin(old)
        moving = [lease for lease in old.leases.values() if not lease.used_version]
        for lease in moving:
            old.drop(lease)
            new.add(lease)
        if moving:
            self.host.touch(old)
            self.host.touch(new)
        self.current[new.name] = new
        if old.leases:
            self.outdated[old] = None
        else:
            self.forget(old)

    def reinstate(self, old: Adapter, found: Adapter) -> None:
        """Make an outdated version current again: what was read is the same version."""
        leases = list(found.leases.values())
        for lease in leases:
            found.drop(lease)
            old.add(lease)
        if found in self.host:
            self.host.remove(found)
        if leases:
            self.host.touch(old)
        del self.outdated[old]
        self.current[old.name] = old

    def hold(self, adapter: Adapter, weights: AdapterWeights) -> None:
        """Keep what has been read, outside the cache, until it gets a slot."""
        adapter.stage = Stage.QUEUED
        adapter.weights = weights
        adapter.lacks_slot = True
        self.queued[adapter] = None

    def fill(self, adapter: Adapter, weights: AdapterWeights) -> None:
        """Fill a version's slot with what has been read."""
        self.host.touch(adapter)
        adapter.weights = weights
        adapter.is_update = False
        adapter.stage = Stage.READY

    def try_evict(self) -> bool:
        """Free the slot of the least recently used version that nobody holds, preferably one that could be
        read again."""
        evicted = self.host.try_evict()
        if evicted is not None:
            self.residents.drop(evicted)
            del self.current[evicted.name]
        return evicted is not None

    def displace(self, adapter: Adapter) -> None:
        """Take the slot away from a version with waiting leases only, which queues again.

        Its weights are kept where it could not be read again as it is: sequences have begun with it, or its
        files have changed since.
        """
        weights = adapter.weights
        assert weights is not None, f"{adapter} is not loaded"
        self.host.evict(adapter)
        self.residents.drop(adapter)
        self.hold(adapter, weights)
        was_used = any(lease.used_version for lease in adapter.leases.values())
        if not (was_used or adapter.is_stale or adapter in self.outdated):
            adapter.weights = None

    def expel(self, adapter: Adapter) -> None:
        """Drop a version, not active, that no longer fits beside the pinned ones."""
        for lease in list(adapter.leases.values()):
            self.fail(lease, no_room(adapter.name))
        if adapter in self.host or adapter in self.queued:
            self.forget(adapter)

    def forget(self, adapter: Adapter) -> None:
        """Drop a version that has no leases and is not being read."""
        self.outdated.pop(adapter, None)
        self.queued.pop(adapter, None)
        if self.current.get(adapter.name) is adapter:
            del self.current[adapter.name]
        if adapter in self.host:
            self.host.remove(adapter)
        self.residents.drop(adapter)

    def unpin(self, adapter: Adapter) -> None:
        """Unpin a version, and leave the pin for its successor."""
        if adapter.is_pinned:
            self.pins_due.add(adapter.name)
            adapter.is_pinned = False

    def check(self) -> list[str]:
        """Broken invariants."""
        known = list(self)
        queued = {adapter for adapter in known if adapter.stage is Stage.QUEUED}
        wrong = [f"host cache: {adapter} is not known" for adapter in self.host if adapter not in known]
        wrong += [
            f"device: {adapter} is not on host" for adapter in self.residents if adapter not in self.host
        ]
        if queued != set(self.queued):
            wrong.append(f"{sorted(map(str, queued))} are queued, not {sorted(map(str, self.queued))}")
        wrong += [f"{n} leads to {e.name}" for n, e in self.current.items() if e.name != n]
        wrong += [f"{e} is outdated and current" for e in self.outdated if self.current.get(e.name) is e]
        wrong += [f"{e} is outdated and nobody holds it" for e in self.outdated if not e.leases]
        wrong += [f"{e} is outdated and was never whole" for e in self.outdated if not e.is_whole]
        names = [(adapter.name, adapter.version) for adapter in known if adapter.version]
        if len(names) != len(set(names)):
            wrong.append(f"a version is there twice: {sorted(names)}")
        return wrong


def no_room(name: str) -> UnavailableError:
    """The error for an adapter that does not fit beside the pinned ones."""
    return UnavailableError(f"adapter {name!r} has no room in the device pool beside pinned ones")


def no_room_at_start(name: str) -> InvalidArgumentError:
    """The same during preloading: the settings do not fit together."""
    return InvalidArgumentError(f"adapter {name!r} has no room beside the pinned ones before it")
