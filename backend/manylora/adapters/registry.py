"""The state of every adapter: absent, loading, on host, on device, failed. Owned by the engine thread.

What is on the device is on host as well. What an active lease uses is evicted from neither. A name stands for
its newest whole version; sequences end on the version that they began with. Nothing here touches a disk: the
loaders' threads do all looks and reads.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

from manylora.adapters.adapter import Lease, Stage
from manylora.adapters.adapter_files import Sight
from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.failures import Failures
from manylora.adapters.host_cache import HostCache
from manylora.adapters.load import Loaded, Read, load
from manylora.adapters.load_queue import LoadQueue
from manylora.adapters.loader import Loader
from manylora.adapters.lookout import STALL_S, Lookout
from manylora.adapters.pins import Pins
from manylora.adapters.placement import AdapterUse
from manylora.adapters.registry_view import check_adapter, list_states
from manylora.adapters.residents import Residents
from manylora.adapters.versions import Versions
from manylora.config import EngineConfig
from manylora.errors import InvalidArgumentError, ManyloraError
from manylora.messages import AdapterState

__all__ = ["Lease", "Registry"]

log = logging.getLogger(__name__)


class Registry:
    """Hands out leases on adapters and moves adapters between disk, host memory and device pool.

    Args:
        config: max_lora_rank, max_cpu_loras, preload_adapters, pinned_adapters, adapter_settle_s,
            adapter_check_s.
        root: where adapters are found.
        read: reads one, on a loader's thread.
        pool: the device level.
        wake: called on a loader's thread when a look or a read has ended, for `poll`.
        clock: seconds; for pauses after failed loads, for looks at files and for what hangs.
        wait: waits until `wake` is called, for so many seconds of the clock at most; in place of the real
            clock's. Only preloading waits.
    """

    def __init__(
        self,
        config: EngineConfig,
        root: AdapterRoot,
        read: Read,
        pool: DevicePool,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] | None = None,
    ) -> None:
        self.config = config
        self._wake, self._woken = wake, threading.Event()
        self._clock, self._wait = clock, wait or self._wait_for_wake
        self.root = root
        self._read = read
        self._versions = Versions(HostCache(config.num_cpu_loras), Residents(pool), set())
        self._host = self._versions.host
        self._residents = self._versions.residents
        self._pins = Pins(self._versions)
        self._failures = Failures(clock)
        self._loader: Loader[Loaded] = Loader(self._on_wake, clock)
        self._looker: Loader[Sight] = Loader(
            self._on_wake, clock, num_threads=1, stall_s=STALL_S, name="manylora-looker"
        )
        self._loads = LoadQueue(self._versions, self._failures, self._loader, self._load)
        self._lookout = Lookout(
            self.root.look,
            self._looker,
            self._loads,
            self._versions,
            self._failures,
            self._pins.leave_slot_for,
            clock=clock,
            settle_s=config.adapter_settle_s,
            check_s=config.adapter_check_s,
        )
        self._loads.report = self._lookout
        self._numbers = itertools.count()

    def acquire(self, adapter_id: str, priority: int = 0) -> Lease:
        """Lease an adapter, in its newest whole version. An absent one is looked for and loaded.

        What the files turn out to be is reported through the lease: the adapter is not found, cannot be
        served, or failed recently and its files are still the same.

        Args:
            priority: higher gets a host slot earlier. The scheduler orders sequences by priority and arrival,
                so leases must be acquired in the order of arrival.

        Raises:
            InvalidArgumentError: no adapter can have this name.
            NotFoundError: this server has no adapters.
        """
        self.root.check_name(adapter_id)
        lease = Lease(next(self._numbers), adapter_id, priority)
        adapter = self._versions.current.get(adapter_id)
        if adapter is None:
            self._lookout.look_for(lease)
            return lease
        adapter.add(lease)
        self._host.touch(adapter)
        if adapter.is_whole:
            self._lookout.refresh(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease, and its active use if there is one."""
        assert not lease.is_released, f"lease {lease.number} was released twice"
        if lease.is_active:
            self.deactivate(lease)
        lease.is_released = True
        if lease.adapter is not None:
            self._versions.leave(lease)
        self._lookout.forget(lease)

    def poll(self) -> None:
        """Process looks and loads that have ended and start the next ones, in each turn of the engine."""
        self._lookout.poll()
        self._loads.poll()
        for name in sorted(self._pins.due):
            self._pins.try_due(name)

    @property
    def next_s(self) -> float:
        """When `poll` has something to do even if `wake` is not called, on the clock; infinity: never."""
        return min(self._lookout.next_s, self._loader.next_s, self._looker.next_s)

    def try_activate(self, lease: Lease) -> AdapterUse | None:
        """Make the adapter resident in the device pool and count a use; None if pages lack now.

        On CUDA its copy may still be in progress: a step that uses it before `is_copied` needs `await_copy`.
        """
        adapter = lease.adapter
        assert adapter is not None, f"lease {lease.number} has failed or ended"
        assert adapter.stage is Stage.READY, f"{adapter.name} is {lease.state}, not ready"
        assert not lease.is_active, f"lease {lease.number} is active already"
        assert lease.used_version in ("", adapter.version), f"{lease.number} began with another {adapter}"
        if not self._residents.try_place(adapter):
            return None
        self._residents.use(adapter)
        lease.is_active = True
        lease.used_version = adapter.version
        return adapter.use

    def is_copied(self, lease: Lease) -> bool:
        """Whether a step that uses the adapter of an active lease need not wait for its copy."""
        assert lease.placement is not None, f"lease {lease.number} is not active"
        return self._residents.pool.tensors.is_copied(lease.placement)

    def await_copy(self, lease: Lease) -> None:
        """Let further steps wait, on the device, for the copy of an active lease's adapter."""
        assert lease.placement is not None, f"lease {lease.number} is not active"
        self._residents.pool.tensors.await_copy(lease.placement)

    def deactivate(self, lease: Lease) -> None:
        """End an active use. The adapter stays on the device until its pages are needed."""
        adapter = lease.adapter
        assert lease.is_active, f"lease {lease.number} is not active"
        assert adapter is not None, "an active lease without its adapter"
        self._residents.unuse(adapter)
        lease.is_active = False

    def preload(self, *, strict: bool) -> None:
        """Load preload_adapters and pinned_adapters, and pin the latter on both levels. Before serving only.

        Each is loaded as for a request, pinned ones first, and waited for: for the disk until that hangs, for
        files that are being written up to MAX_SETTLE_S.

        Args:
            strict: whether one that cannot be loaded is an error. Otherwise it is logged and has failed, as
                if for a request; its pin comes into force when it loads.

        Raises:
            InvalidArgumentError: they are too many.
            ManyloraError: one of them cannot be loaded, or has no room. With `strict` only.
        """
        pinned = tuple(dict.fromkeys(self.config.pinned_adapters))
        names = tuple(dict.fromkeys((*pinned, *self.config.preload_adapters)))
        if len(names) > self._host.max_entries:
            raise InvalidArgumentError(
                f"{len(names)} adapters are to be preloaded, max_cpu_loras={self._host.max_entries}"
            )
        self._pins.due.update(pinned)
        self._loads.is_preloading = True
        for name in names:
            try:
                self._load_now(name)
            except ManyloraError as error:
                if name not in self._failures:
                    self._failures.remember(name, error)
                if strict:
                    raise
                log.error("adapter %r cannot be preloaded and has failed: %s", name, error.message)
        self._loads.is_preloading = False

    def _load_now(self, name: str) -> None:
        lease = self.acquire(name)
        self.poll()
        while lease.state not in ("ready", "failed"):
            self._wait(max(0.0, self.next_s - self._clock()))
            self.poll()
        self.release(lease)
        if lease.error is not None:
            raise lease.error

    def pin(self, adapter_id: str) -> None:
        """Keep a loaded adapter, and each version that follows it, on host and device until `unpin`.

        Raises:
            UnavailableError: it is not loaded, has no room on the device now, or would leave too little for
                others: one host slot, and pages for one adapter of max_lora_rank.
        """
        self._pins.pin(adapter_id)

    def unpin(self, adapter_id: str) -> None:
        """Let a pinned adapter be evicted again.

        Raises:
            InvalidArgumentError: it is not pinned.
        """
        self._pins.unpin(adapter_id)

    def close(self) -> None:
        """End the loaders' threads, except those that hang. Leases are no longer served."""
        self._looker.close()
        self._loader.close()

    @property
    def counters(self) -> dict[str, int]:
        """Monotonic."""
        return {
            "host_loads": self._loads.num_loads,
            "host_evictions": self._host.num_evictions,
            "device_copies": self._residents.num_copies,
            "device_evictions": self._residents.num_evictions,
        }

    @property
    def gauges(self) -> dict[str, int]:
        """Now."""
        pool = self._residents.pool
        return {
            "host_adapters": sum(adapter.stage is Stage.READY for adapter in self._versions),
            "device_adapters": len(self._residents),
            "pool_pages_free": sum(pool.num_free[: pool.num_kinds]),
            "pool_pages_total": pool.num_pages * pool.num_kinds,
            "pool_bytes": pool.tensors.num_bytes,
        }

    def states(self) -> list[AdapterState]:
        """Every adapter that is not absent, by name: its newest version, then older ones that are held."""
        return list_states(self._versions, self._lookout, self._failures)

    def check(self) -> list[str]:
        """Broken invariants of the registry and both its levels."""
        wrong = self._host.check() + self._residents.check() + self._versions.check()
        wrong += self._loads.check() + self._lookout.check()
        for adapter in self._versions:
            wrong += check_adapter(adapter, self._versions)
        return wrong

    def _on_wake(self) -> None:
        """On a loader's thread."""
        self._woken.set()
        self._wake()

    def _wait_for_wake(self, timeout_s: float) -> None:
        self._woken.wait(min(timeout_s, threading.TIMEOUT_MAX))
        # The next `poll` finds what has ended by now; what ends later sets the event again.
        self._woken.clear()

    def _load(self, name: str, seen: Sight) -> Loaded:
        return load(name, seen, self.root.look, self._read, self.config.adapter_settle_s)
