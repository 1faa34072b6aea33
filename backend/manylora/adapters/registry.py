"""The state of every adapter: absent, loading, on host, on device, failed. Owned by the engine thread.

What is on the device is on host too. What an active lease uses is evicted from neither. A name leads to its
newest whole version; sequences end on the version that they began with. Nothing here touches a disk: looks
and reads are the loader's.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

import torch

from manylora.adapters.adapter import Lease, Stage
from manylora.adapters.adapter_files import Sight
from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.failures import Failures
from manylora.adapters.host_cache import HostCache
from manylora.adapters.load import Loaded, load
from manylora.adapters.load_queue import LoadQueue
from manylora.adapters.loader import Loader
from manylora.adapters.lookout import STALL_S, Lookout
from manylora.adapters.pins import Pins
from manylora.adapters.placement import AdapterUse
from manylora.adapters.reader import Read, reader
from manylora.adapters.registry_view import check_adapter, state_of
from manylora.adapters.residents import Residents
from manylora.adapters.versions import Versions
from manylora.config import EngineConfig
from manylora.errors import InvalidArgumentError, ManyloraError
from manylora.messages import AdapterState
from manylora.model.spec import ModelSpec

__all__ = ["Lease", "Registry"]

log = logging.getLogger(__name__)


class Registry:
    """Hands out leases on adapters and moves adapters between disk, host memory and device pool.

    Args:
        spec: the base model's linears.
        config: adapter_root, max_lora_rank, max_cpu_loras, preload_adapters, pinned_adapters,
            adapter_settle_s, adapter_check_s.
        pool: the device level.
        dtype: the pool's.
        wake: called on a loader's thread when `poll` has something to take.
        clock: seconds, for pauses behind failed loads, for looks at files and for what hangs.
        wait: waits until `wake` is called, for so many seconds of the clock at most; in place of the real
            clock's. Only preloading waits.
        read: what reads an adapter, instead of `read_adapter`.
        strict: whether an adapter_root that is no directory is an error.

    Raises:
        InvalidArgumentError: adapter_root is no directory. With `strict` only.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: EngineConfig,
        pool: DevicePool,
        dtype: torch.dtype,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] | None = None,
        read: Read | None = None,
        *,
        strict: bool = True,
    ) -> None:
        self.config = config
        self._wake, self._woken = wake, threading.Event()
        self._clock, self._wait = clock, wait or self._wait_for_wake
        self.root = AdapterRoot(config.adapter_root, strict=strict)
        self._read = read or reader(config, self.root, spec, dtype, pin=pool.device.type == "cuda")
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
        """Begin a hold on an adapter, on its newest whole version. An absent one is looked for and loaded.

        Whatever the files have to say comes through the lease: that the adapter is not found, cannot be
        served, or failed a short time ago and its files are still the same.

        Args:
            adapter_id: the adapter.
            priority: higher gets a host slot earlier. Leases of sequences that the scheduler orders by
                priority and arrival must be acquired in the order of arrival.

        Raises:
            InvalidArgumentError: no adapter can have this name.
            NotFoundError: this server has no adapters.
        """
        self.root.check_name(adapter_id)
        lease = Lease(next(self._numbers), adapter_id, priority)
        adapter = self._versions.current.get(adapter_id)
        if adapter is None:
            self._lookout.ask(lease)
            return lease
        adapter.add(lease)
        self._host.touch(adapter)
        if adapter.is_whole:
            self._lookout.refresh(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """End a hold, and its active use if there is one."""
        assert not lease.is_released, f"lease {lease.number} was released twice"
        if lease.is_active:
            self.deactivate(lease)
        lease.is_released = True
        if lease.adapter is not None:
            self._versions.leave(lease)
        self._lookout.forget(lease)

    def poll(self) -> None:
        """Take finished looks and loads and start the next ones. At each turn of the engine's loop."""
        self._lookout.poll()
        self._loads.poll()
        for name in sorted(self._pins.due):
            self._pins.try_due(name)

    @property
    def next_s(self) -> float:
        """When `poll` has something to do though nothing wakes it, on the clock; infinity: never."""
        return min(self._lookout.next_s, self._loader.next_s, self._looker.next_s)

    def try_activate(self, lease: Lease) -> AdapterUse | None:
        """Make the adapter resident in the device pool and count a use; None if pages lack now.

        On CUDA its copy may go on: a step that uses it before `is_copied` comes behind `await_copy`.
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
        """Whether a step that uses the adapter of an active lease would wait for no copy."""
        assert lease.placement is not None, f"lease {lease.number} is not active"
        return self._residents.pool.is_copied(lease.placement)

    def await_copy(self, lease: Lease) -> None:
        """Order further steps behind the copy of an active lease's adapter. Does not block the host."""
        assert lease.placement is not None, f"lease {lease.number} is not active"
        self._residents.pool.await_copy(lease.placement)

    def deactivate(self, lease: Lease) -> None:
        """End an active use. The adapter stays on the device until its pages are wanted."""
        adapter = lease.adapter
        assert lease.is_active, f"lease {lease.number} is not active"
        assert adapter is not None, "an active lease without its adapter"
        self._residents.unuse(adapter)
        lease.is_active = False

    def preload(self, *, strict: bool) -> None:
        """Load preload_adapters and pinned_adapters, and pin the latter on both levels. Before serving only.

        One after the other, pinned ones first, each as for a request and waited for: for the disk until that
        hangs, for a writer until MAX_SETTLE_S.

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
        """Keep a loaded adapter on host and device until `unpin`, and each version that follows it.

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
        """End the loader's threads, but for those that hang. Leases are not served any more."""
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
            "pool_pages_free": sum(pool.num_free[: len(pool.kinds)]),
            "pool_pages_total": pool.num_pages * len(pool.kinds),
            "pool_bytes": pool.num_bytes,
        }

    def states(self) -> list[AdapterState]:
        """Every adapter that is not absent, by name: its newest version, then older ones that are held."""
        current = self._versions.current
        states = [
            state_of(adapter, self._versions, self._lookout.fault_of(n)) for n, adapter in current.items()
        ]
        looked_for = self._lookout.names_looked_for()
        states += [AdapterState(name=name, state="loading") for name in looked_for]
        states += [
            AdapterState(name=name, state="failed")
            for name in self._failures
            if name not in current and name not in looked_for
        ]
        states += [state_of(adapter, self._versions, "") for adapter in self._versions.outdated]
        return sorted(states, key=lambda state: (state.name, state.outdated))

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
        # What has ended by now is found by the next `poll`, what ends later sets it again.
        self._woken.clear()

    def _load(self, name: str, asked: Sight) -> Loaded:
        return load(name, asked, self.root.look, self._read, self.config.adapter_settle_s)
