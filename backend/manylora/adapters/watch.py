"""What is known about the files behind one name, and who waits for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from manylora.adapters.adapter import Lease
from manylora.adapters.adapter_files import Sight, Stamp
from manylora.adapters.loader import Job
from manylora.adapters.versions import Versions


@dataclass(slots=True, eq=False)
class Watch:
    """What is known about the files behind one name, and who waits for them."""

    name: str
    for_next_look: dict[int, Lease] = field(default_factory=dict)
    """Leases that wait for the next look to begin and end."""
    for_this_look: dict[int, Lease] = field(default_factory=dict)
    """Leases that wait for the current look."""
    settling: dict[int, Lease] = field(default_factory=dict)
    """Leases on an absent adapter whose files are being written."""
    job: Job[Sight] | None = None
    """The current look."""
    is_wanted: bool = False
    """A look is due although no lease waits for it."""
    looked_s: float = -math.inf
    """When the last look ended."""
    seen: Stamp | None = None
    """Stamp of changed files at the last look."""
    settled_s: float = 0.0
    """When they will have been unchanged for long enough to be read."""
    relook_s: float = math.inf
    """When to look again, whether or not a request arrives."""
    is_hung: bool = False
    """The current look has failed as hung."""
    fault: str = ""
    """Why the current files cannot be served, while an older version is."""
    logged: tuple[Stamp | None, str] = (None, "")
    """Stamp and message of the fault that the log has."""

    @property
    def leases(self) -> list[Lease]:
        """All leases that wait."""
        return [*self.for_next_look.values(), *self.affected]

    @property
    def is_scheduled(self) -> bool:
        """Whether a look should begin now or later."""
        return self.is_due or self.relook_s < math.inf

    @property
    def affected(self) -> list[Lease]:
        """Those for which the current look decides."""
        return [*self.for_this_look.values(), *self.settling.values()]

    @property
    def is_due(self) -> bool:
        """Whether a look should begin at once."""
        return bool(self.for_next_look) or self.is_wanted

    def forget(self, lease: Lease) -> None:
        """Remove a lease that no longer waits."""
        lease.awaits_look = False
        for leases in (self.for_next_look, self.for_this_look, self.settling):
            leases.pop(lease.number, None)


class Watches:
    """The watches by name, and which of them are to be looked at.

    A watch is dropped once nobody waits for it and its adapter is absent.
    """

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self._by_name: dict[str, Watch] = {}
        self._scheduled: dict[Watch, None] = {}
        self._num_to_sweep = 0
        """Number of watches at which those that nobody needs are dropped."""

    def __iter__(self) -> Iterator[Watch]:
        return iter(self._by_name.values())

    @property
    def scheduled(self) -> list[Watch]:
        """Those whose files are to be looked at, now or later."""
        return list(self._scheduled)

    def find(self, name: str) -> Watch | None:
        """The watch with a name, if there is one."""
        return self._by_name.get(name)

    def get(self, name: str) -> Watch:
        """The watch with a name, made if there is none."""
        watch = self._by_name.get(name)
        if watch is None:
            if len(self._by_name) >= self._num_to_sweep:
                for idle in list(self._by_name.values()):
                    self.drop_if_idle(idle)
                self._num_to_sweep = 2 * len(self._by_name) + 64
            watch = self._by_name[name] = Watch(name)
        return watch

    def drop_if_idle(self, watch: Watch) -> None:
        """Forget a watch that nobody needs."""
        if watch.job is None and not watch.leases and watch.name not in self._versions.current:
            del self._by_name[watch.name]
            self._scheduled.pop(watch, None)

    def reschedule(self, watch: Watch) -> None:
        """Note whether a watch is to be looked at. To be called whenever that may have changed."""
        if watch.is_scheduled:
            self._scheduled[watch] = None
        else:
            self._scheduled.pop(watch, None)

    def look_again(self, watch: Watch, at_s: float) -> None:
        """Have the files looked at again at a certain time, whether or not a request arrives."""
        watch.relook_s = at_s
        self.reschedule(watch)

    def check(self) -> list[str]:
        """Broken invariants."""
        scheduled = {watch for watch in self if watch.is_scheduled}
        return [f"{watch.name} is to be looked at or not" for watch in scheduled ^ self._scheduled.keys()]
