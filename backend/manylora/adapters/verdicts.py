"""What follows from a look at an adapter's files: a load, a new version, an error, or a wait."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from manylora.adapters.adapter import Adapter
from manylora.adapters.adapter_files import Sight
from manylora.adapters.failures import Failures
from manylora.adapters.load import named
from manylora.adapters.load_queue import LoadQueue
from manylora.adapters.versions import Versions
from manylora.adapters.watch import Watch, Watches
from manylora.errors import ManyloraError, UnavailableError, from_code

log = logging.getLogger(__name__)

MAX_SETTLE_S = 10.0
"""Longest that a request waits, beyond `settle_s`, for an absent adapter's files that are being written."""
RETRY_S = 0.25
"""Until changed files are looked at again whose read had to wait for another one."""


class Verdicts:
    """Acts on the outcome of each look.

    Args:
        has_slots: whether an adapter could be loaded; otherwise every host slot is pinned by others.
    """

    def __init__(
        self,
        watches: Watches,
        loads: LoadQueue,
        versions: Versions,
        failures: Failures,
        has_slots: Callable[[str], bool],
        *,
        clock: Callable[[], float],
        settle_s: float,
    ) -> None:
        self._watches = watches
        self._loads = loads
        self._versions = versions
        self._failures = failures
        self._has_slots = has_slots
        self._clock = clock
        self._settle_s = settle_s

    def set_gone(self, watch: Watch, error: ManyloraError) -> None:
        """The directory is gone: fail those who wait for it; the loaded version ends with its leases."""
        current = self._versions.current.get(watch.name)
        self._failures.forget(watch.name)
        for lease in watch.affected:
            watch.forget(lease)
            self._versions.fail(lease, from_code(error.code, error.message))
        # A version that is being read now finds out by itself.
        if current is not None and self._versions.current.get(watch.name) is current and current.is_whole:
            log.info("adapter %r: its directory is gone", watch.name)
            self._versions.retire(current)
            for lease in watch.for_next_look.values():
                # It waits for what may take the directory's place.
                self._versions.leave(lease)
        self.set_clear(watch, None)

    def set_unreadable(self, watch: Watch, error: ManyloraError) -> None:
        """Whether the files exist cannot be determined."""
        if watch.name in self._versions.current:
            self.mark(watch, error)
            self.release_waiting(watch)
        else:
            self.fail_all(watch, error)

    def judge_absent(self, watch: Watch, sight: Sight) -> None:
        """Load an absent adapter, wait until its files are no longer being written, or fail those who
        wait."""
        name, leases = watch.name, watch.affected
        error = self._failures.recall(name, sight.stamp)
        if error is None and sight.error is not None:
            error = named(name, sight.error)
            assert error is not None, "an error was lost"
            self._failures.remember(name, error, sight.stamp)
        if error is None and self._loads.is_hung(name):
            error = UnavailableError(f"adapter {name!r}: its files give no answer")
        if error is None and not self._has_slots(name):
            error = UnavailableError(f"adapter {name!r} cannot be loaded: every host slot is pinned")
        if error is not None:
            self.fail_all(watch, error)
        elif self._is_settled(watch, sight, age_s=min(max(sight.age_s, 0.0), self._settle_s)):
            watch.seen = None
            watch.relook_s = math.inf
            for lease in leases:
                watch.forget(lease)
            if leases:
                waiting = list(watch.for_next_look.values())
                for lease in waiting:
                    watch.forget(lease)
                self._loads.enter(name, sight, [*leases, *waiting])
            self._watches.reschedule(watch)
        else:
            self._wait_on(watch)

    def _wait_on(self, watch: Watch) -> None:
        """The files are being written: go on waiting, or fail those who have waited too long."""
        now_s = self._clock()
        for lease in watch.affected:
            watch.forget(lease)
            if now_s >= lease.give_up_s:
                reason = "its files keep changing; they are read once they have been left alone for"
                error = UnavailableError(f"adapter {watch.name!r}: {reason} {self._settle_s:g} s")
                self._versions.fail(lease, error)
            else:
                watch.settling[lease.number] = lease
                lease.give_up_s = min(lease.give_up_s, now_s + self._settle_s + MAX_SETTLE_S)

    def judge_present(self, watch: Watch, sight: Sight) -> None:
        """Have changed files read as a new version once they are no longer being written."""
        name, current = watch.name, self._versions.current[watch.name]
        self.release_waiting(watch)
        if not current.is_whole:
            return
        if sight.stamp == current.sight.stamp:
            self._failures.forget(name)
            self.set_clear(watch, current)
            return
        current.is_stale = True
        if not self._is_settled(watch, sight, age_s=0.0) or self._loads.is_updating(name):
            return
        if sight.error is not None:
            error = named(name, sight.error)
            assert error is not None, "an error was lost"
            self.mark(watch, error)
        elif self._failures.recall(name, sight.stamp) is not None or self._loads.is_hung(name):
            # The log and the status report it already.
            return
        elif not self._loads.try_update(name, sight):
            self._watches.look_again(watch, self._clock() + RETRY_S)

    def _is_settled(self, watch: Watch, sight: Sight, *, age_s: float) -> bool:
        """Whether the files have stayed the same for `settle_s`; if not, they are looked at again.

        Args:
            age_s: how long they count as unchanged at the first look.
        """
        now_s = self._clock()
        if watch.seen != sight.stamp:
            # One number for this comparison and the next look's time: two sums could round differently, and a
            # look that came too early would cause the next one at once.
            watch.seen, watch.settled_s = sight.stamp, now_s + (self._settle_s - age_s)
        if now_s >= watch.settled_s:
            return True
        self._watches.look_again(watch, watch.settled_s)
        return False

    def set_clear(self, watch: Watch, current: Adapter | None) -> None:
        """What new requests get matches the files."""
        watch.seen = None
        watch.fault = ""
        watch.relook_s = math.inf
        self._watches.reschedule(watch)
        if current is not None:
            current.is_stale = False

    def mark(self, watch: Watch, error: ManyloraError) -> None:
        """Report, in the log once for each reason, that an older version stays in service."""
        current = self._versions.current.get(watch.name)
        watch.fault = error.message
        if current is not None and watch.logged != (watch.seen, error.message):
            watch.logged = (watch.seen, error.message)
            log.warning("%s; version %s is served on", error.message, current.version or "in memory")

    def release_waiting(self, watch: Watch) -> None:
        """Let those who wait for the look go on with the loaded version."""
        for lease in watch.for_this_look.values():
            lease.awaits_look = False
        watch.for_this_look = {}

    def fail_all(self, watch: Watch, error: ManyloraError) -> None:
        """Fail those who wait for the look, or for files that are being written."""
        for lease in watch.affected:
            watch.forget(lease)
            # A new object for each, since each is raised somewhere else.
            self._versions.fail(lease, from_code(error.code, error.message))
