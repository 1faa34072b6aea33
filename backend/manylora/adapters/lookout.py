"""Keeps track of the files behind each name, and has them looked at: what is there, has changed, or is gone.

An absent adapter is looked for when a request names it. A loaded one is looked at again on the first request
that arrives `check_s` after the last look, and that request goes on with the loaded version. Changed files
are read once two looks, `settle_s` apart on our own clock, have seen them the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from manylora.adapters.adapter import Adapter, Lease
from manylora.adapters.adapter_files import Sight
from manylora.adapters.failures import Failures
from manylora.adapters.load import Loaded, Look
from manylora.adapters.load_queue import LoadQueue
from manylora.adapters.loader import Job, Loader
from manylora.adapters.verdicts import MAX_SETTLE_S, Verdicts
from manylora.adapters.versions import Versions
from manylora.adapters.watch import Watch, Watches
from manylora.errors import NotFoundError

log = logging.getLogger(__name__)

STALL_S = 0.5
"""One thread begins the looks in their order; another replaces it if a look takes so long."""


class Lookout:
    """Ensures that new requests get the newest whole version of an adapter, or an error if there is none.

    Args:
        look: looks at an adapter's files; runs on threads of `looker`.
        has_slots: whether an adapter could be loaded; otherwise every host slot is pinned by others.
    """

    def __init__(
        self,
        look: Look,
        looker: Loader[Sight],
        loads: LoadQueue,
        versions: Versions,
        failures: Failures,
        has_slots: Callable[[str], bool],
        *,
        clock: Callable[[], float],
        settle_s: float,
        check_s: float,
    ) -> None:
        self._look = look
        self._looker = looker
        self._versions = versions
        self._watches = Watches(versions)
        self._verdicts = Verdicts(
            self._watches, loads, versions, failures, has_slots, clock=clock, settle_s=settle_s
        )
        self._clock = clock
        self._settle_s = settle_s
        self._check_s = check_s
        self._looking: dict[Job[Sight], Watch] = {}

    @property
    def next_s(self) -> float:
        """When `poll` has something to do even if no look has ended; infinity: never."""
        return min((watch.relook_s for watch in self._watches.scheduled), default=math.inf)

    @property
    def is_looking(self) -> bool:
        """Whether looks are in progress or about to begin."""
        return bool(self._looking) or any(watch.is_due for watch in self._watches.scheduled)

    def fault_of(self, name: str) -> str:
        """Why the current files cannot be served, while an older version is. Empty: they can."""
        watch = self._watches.find(name)
        return watch.fault if watch is not None else ""

    def names_looked_for(self) -> list[str]:
        """Absent adapters that leases wait for."""
        names = [watch.name for watch in self._watches if watch.leases]
        return [name for name in names if name not in self._versions.current]

    def look_for(self, lease: Lease) -> None:
        """Have an absent adapter looked for."""
        watch = self._watches.get(lease.adapter_id)
        watch.for_next_look[lease.number] = lease
        self._watches.reschedule(watch)

    def refresh(self, lease: Lease) -> None:
        """Have the files of a loaded adapter looked at, if that is due."""
        watch = self._watches.get(lease.adapter_id)
        if self._check_s < 0 or (watch.job is not None and watch.job.is_stalled):
            return
        if self._check_s == 0:
            lease.awaits_look = True
            watch.for_next_look[lease.number] = lease
        elif self._clock() - watch.looked_s > self._check_s and watch.job is None:
            watch.is_wanted = True
        self._watches.reschedule(watch)

    def forget(self, lease: Lease) -> None:
        """A lease has ended."""
        watch = self._watches.find(lease.adapter_id)
        if watch is not None:
            watch.forget(lease)
            self._watches.reschedule(watch)
            self._watches.drop_if_idle(watch)

    def poll(self) -> None:
        """Process the looks that have ended and begin those that are due. Called in each turn of the engine's
        loop."""
        for job in self._looker.drain():
            self._finish_look(job)
        is_blocked = self._looker.is_blocked
        for job, watch in self._looking.items():
            if job.is_stalled or is_blocked:
                self._let_go(watch)
        now_s = self._clock()
        for watch in self._watches.scheduled:
            if watch.job is None and (watch.is_due or watch.relook_s <= now_s):
                self._begin(watch)

    def check(self) -> list[str]:
        """Broken invariants."""
        wrong = self._watches.check()
        for watch in self._watches:
            name = watch.name
            current = self._versions.current.get(name)
            wrong += [
                f"lease {lease.number} waits for a look at {name} and has ended"
                for lease in watch.leases
                if lease.is_released or lease.error is not None
            ]
            if any(lease.adapter is not current for lease in watch.leases):
                wrong.append(f"a lease that waits for {name} holds another version of it")
            wrong += [f"lease {n} waits for no look at {name}" for n in self._left_waiting(watch)]
            if watch.settling and watch.job is None and watch.relook_s == math.inf:
                wrong.append(f"{name} is waited for and is not looked at again")
            if (watch.job is not None) != (watch in self._looking.values()):
                wrong.append(f"{name} has lost its look")
        return wrong

    def _left_waiting(self, watch: Watch) -> list[int]:
        """Leases that wait for a look that no watch knows of."""
        current = self._versions.current.get(watch.name)
        leases = current.leases.values() if current is not None else ()
        waiting = {lease.number for lease in watch.leases}
        return [lease.number for lease in leases if lease.awaits_look and lease.number not in waiting]

    # Reports of the load queue.

    def on_loaded(self, adapter: Adapter) -> None:
        """See `Reported`."""
        watch = self._watches.get(adapter.name)
        watch.looked_s = self._clock()
        self._verdicts.set_clear(watch, adapter)

    def on_invalid(self, loaded: Loaded, name: str) -> None:
        """See `Reported`."""
        assert loaded.error is not None, "files are invalid for no reason"
        self._verdicts.mark(self._watches.get(name), loaded.error)

    def on_torn(self, loaded: Loaded, name: str, leases: list[Lease]) -> None:
        """See `Reported`."""
        watch = self._watches.get(name)
        watch.seen = None
        watch.settling |= {lease.number: lease for lease in leases}
        for lease in leases:
            lease.give_up_s = min(lease.give_up_s, self._clock() + self._settle_s + MAX_SETTLE_S)
        self._watches.look_again(watch, self._clock())
        self._watches.drop_if_idle(watch)

    # From here on: a look, from its start to its consequences.

    def _begin(self, watch: Watch) -> None:
        name = watch.name
        watch.for_this_look, watch.for_next_look = watch.for_next_look, {}
        watch.is_wanted = False
        watch.relook_s = math.inf
        self._watches.reschedule(watch)
        watch.job = Job(name, lambda: self._look(name))
        self._looking[watch.job] = watch
        self._looker.submit(watch.job)

    def _let_go(self, watch: Watch) -> None:
        """Stop waiting for a look that stalls where an older version can be served, and for one that hangs in
        any case."""
        assert watch.job is not None, "no look is in progress"
        watch.for_this_look |= watch.for_next_look
        watch.for_next_look = {}
        watch.is_wanted = False
        self._watches.reschedule(watch)
        if watch.name in self._versions.current:
            self._verdicts.release_waiting(watch)
        elif watch.job.is_hung:
            assert watch.job.error is not None, "a look that hangs has no error"
            self._verdicts.fail_all(watch, watch.job.error)

    def _finish_look(self, job: Job[Sight]) -> None:
        watch = self._looking[job]
        if job.is_hung and not watch.is_hung:
            # It still occupies its thread, and `poll` stops others waiting for it.
            watch.is_hung = True
            if job.error is not None:
                self._verdicts.mark(watch, job.error)
            return
        del self._looking[job]
        watch.job = None
        watch.looked_s = self._clock()
        if watch.is_hung:
            watch.is_hung = False
        elif isinstance(job.error, NotFoundError):
            self._verdicts.set_gone(watch, job.error)
        elif job.error is not None:
            self._verdicts.set_unreadable(watch, job.error)
        else:
            assert job.value is not None, "a look without a result"
            if watch.name in self._versions.current:
                self._verdicts.judge_present(watch, job.value)
            else:
                self._verdicts.judge_absent(watch, job.value)
        self._watches.drop_if_idle(watch)
