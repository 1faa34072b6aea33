"""The state of every adapter: absent, loading, on host, on device, failed. Owned by the engine thread.

What is on the device is on host too. What an active lease uses is evicted from neither.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.device_pool import DevicePool, num_pages_of
from manylora.adapters.failures import Failures
from manylora.adapters.host_cache import HostCache
from manylora.adapters.intake import Intake
from manylora.adapters.lease import Entry, Lease, Stage
from manylora.adapters.loader import Loader, Read, load
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.reasons import quote
from manylora.adapters.registry_view import check_entry, state_of
from manylora.adapters.residents import Residents
from manylora.adapters.weights import AdapterWeights
from manylora.config import EngineConfig
from manylora.errors import InvalidArgumentError, ManyloraError, UnavailableError
from manylora.messages import AdapterState
from manylora.model.spec import ModelSpec

__all__ = ["Lease", "Registry"]

log = logging.getLogger(__name__)


class Registry:
    """Hands out leases on adapters and moves adapters between disk, host memory and device pool.

    Args:
        spec: the base model's linears.
        config: adapter_root, max_lora_rank, max_cpu_loras, preload_adapters, pinned_adapters.
        pool: the device level.
        dtype: the pool's.
        wake: called on a loader's thread when `poll` has something to take.
        clock: seconds, for the pauses behind failed loads.
        read: what reads an adapter, instead of `read_adapter`.

    Raises:
        InvalidArgumentError: adapter_root is no directory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: EngineConfig,
        pool: DevicePool,
        dtype: torch.dtype,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        read: Read | None = None,
    ) -> None:
        self.config = config
        self.root = AdapterRoot(config.adapter_root)
        self._read = read or self._reader(spec, dtype, pin=pool.device.type == "cuda")
        self._host: HostCache[AdapterWeights] = HostCache(config.num_cpu_loras)
        self._residents = Residents(pool)
        self._failures = Failures(clock)
        self._loader = Loader(self._read, wake)
        self._intake = Intake(self._host, self._residents, self._failures, self._loader)
        self._numbers = itertools.count()
        self._pins_due: set[str] = set()
        """Adapters to be pinned as soon as they are loaded and the device has room."""

    def acquire(self, adapter_id: str, priority: int = 0) -> Lease:
        """Begin a hold on an adapter. The first one for an absent adapter queues its load.

        Args:
            adapter_id: the adapter.
            priority: higher gets a host slot earlier. Leases of sequences that the scheduler orders by
                priority and arrival must be acquired in the order of arrival.

        Raises:
            NotFoundError: `adapter_root` has no such directory.
            InvalidArgumentError: the name or the link behind it is not allowed.
            UnavailableError: every host slot is pinned by others.
            ManyloraError: the error of a load that failed a short time ago.
        """
        entry = self._intake.entries.get(adapter_id) or self._enter(adapter_id)
        lease = Lease(next(self._numbers), entry, priority)
        entry.add(lease)
        if entry.stage is not Stage.QUEUED:
            self._host.acquire(entry.name)
        return lease

    def release(self, lease: Lease) -> None:
        """End a hold, and its active use if there is one."""
        assert not lease.is_released, f"lease {lease.number} was released twice"
        if lease.is_active:
            self.deactivate(lease)
        lease.is_released = True
        entry, lease.entry = lease.entry, None
        if entry is None:
            return
        entry.drop(lease)
        if entry.stage is not Stage.QUEUED:
            self._host.release(entry.name)
        elif not entry.leases:
            self._intake.withdraw(entry)

    def poll(self) -> None:
        """Take finished loads and start the next ones. At each turn of the engine's loop."""
        self._intake.poll()
        for name in sorted(self._pins_due):
            self._try_due_pin(name)

    def try_activate(self, lease: Lease) -> bool:
        """Make the adapter resident in the device pool and count a use; False if pages lack now.

        On CUDA its copy may go on: a step that uses it before `is_copied` comes behind `await_copy`.
        """
        entry = lease.entry
        assert entry is not None, f"lease {lease.number} has failed or ended"
        assert entry.weights is not None, f"{entry.name} is {lease.state}, not ready"
        assert not lease.is_active, f"lease {lease.number} is active already"
        if not self._residents.try_place(entry.name, entry.weights):
            return False
        self._residents.use(entry.name)
        entry.placement = self._residents[entry.name].placement
        entry.num_active += 1
        lease.is_active = True
        lease.used_version = entry.weights.version
        return True

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
        entry = lease.entry
        assert lease.is_active, f"lease {lease.number} is not active"
        assert entry is not None, "an active lease without its adapter"
        self._residents.unuse(entry.name)
        lease.is_active = False
        entry.num_active -= 1
        if not entry.num_active:
            entry.placement = None

    def preload(self, *, strict: bool) -> None:
        """Read preload_adapters and pinned_adapters, and pin the latter on both levels. Before serving only.

        Args:
            strict: whether one that cannot be loaded is an error. Otherwise it is logged and has failed, as
                if a request had asked for it; its pin comes into force when it loads.

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
        self._pins_due.update(pinned)
        for name in names:
            try:
                self._preload(name)
            except ManyloraError as error:
                if strict:
                    raise
                log.error("adapter %r cannot be preloaded and has failed: %s", name, error.message)
                self._failures.remember(name, error)

    def _preload(self, name: str) -> None:
        entry = Entry(name, self.root.find(name))
        loaded = load(self._read, name, entry.directory)
        if loaded.weights is None:
            assert loaded.error is not None, "a load without a result"
            raise loaded.error
        if not self._residents.fits_beside_pinned(loaded.weights):
            raise InvalidArgumentError(f"adapter {name!r} has no room beside the pinned ones before it")
        self._intake.admit(entry, loaded.weights)
        if name in self._pins_due:
            self._try_due_pin(name)

    def pin(self, adapter_id: str) -> None:
        """Keep a loaded adapter on host and device until `unpin`.

        Raises:
            UnavailableError: it is not loaded, has no room on the device now, or would leave too little for
                others: one host slot, and pages for one adapter of max_lora_rank.
        """
        entry = self._intake.entries.get(adapter_id)
        if entry is None or entry.weights is None:
            raise UnavailableError(f"adapter {quote(adapter_id)} is not loaded: it cannot be pinned")
        if self._host[adapter_id].is_pinned:
            return
        largest = num_pages_of(self.config.max_lora_rank)
        if (
            self._num_pins + 1 >= self._host.max_entries
            or min(self._residents.pages_beside_pinned(entry.weights)) < largest
        ):
            raise UnavailableError(
                f"adapter {adapter_id!r} cannot be pinned: others need a host slot and {largest} device "
                "pages of each kind beside the pinned ones"
            )
        self._pin(adapter_id)

    def unpin(self, adapter_id: str) -> None:
        """Let a pinned adapter be evicted again.

        Raises:
            InvalidArgumentError: it is not pinned.
        """
        if adapter_id in self._pins_due:
            self._pins_due.remove(adapter_id)
            return
        if adapter_id not in self._host or not self._host[adapter_id].is_pinned:
            raise InvalidArgumentError(f"adapter {quote(adapter_id)} is not pinned")
        self._host.unpin(adapter_id)
        self._residents[adapter_id].is_pinned = False

    def close(self) -> None:
        """End the loader's threads. Leases are not served any more."""
        self._loader.close()

    @property
    def counters(self) -> dict[str, int]:
        """Monotonic."""
        return {
            "host_loads": self._intake.num_loads,
            "host_evictions": self._host.num_evictions,
            "device_copies": self._residents.num_copies,
            "device_evictions": self._residents.num_evictions,
        }

    @property
    def gauges(self) -> dict[str, int]:
        """Now."""
        pool = self._residents.pool
        return {
            "host_adapters": sum(entry.stage is Stage.READY for entry in self._intake.entries.values()),
            "device_adapters": len(self._residents),
            "pool_pages_free": sum(pool.num_free),
            "pool_pages_total": pool.num_pages * len(pool.kinds),
            "pool_bytes": pool.num_bytes,
        }

    def states(self) -> list[AdapterState]:
        """Every adapter that is not absent, by name."""
        loaded = [state_of(entry, self._host, self._residents) for entry in self._intake.entries.values()]
        failed = [
            AdapterState(name=n, state="failed") for n in self._failures if n not in self._intake.entries
        ]
        return sorted([*loaded, *failed], key=lambda state: state.name)

    def check(self) -> list[str]:
        """Broken invariants of the registry and both its levels."""
        wrong = self._host.check() + self._residents.check() + self._intake.check()
        for entry in self._intake.entries.values():
            wrong += check_entry(entry, self._host, self._residents)
        wrong += [f"device: {n} is not on host" for n in self._residents.names() if n not in self._host]
        return wrong

    def _enter(self, name: str) -> Entry:
        try:
            directory = self.root.find(name)
        except ManyloraError:
            self._failures.forget(name)
            raise
        failure = self._failures.recall(name)
        if failure is not None:
            raise failure
        # Those that are due come too: whoever else waited for a slot would then wait for ever.
        if name not in self._pins_due and self._num_pins >= self._host.max_entries:
            raise UnavailableError(f"adapter {name!r} cannot be loaded: every host slot is pinned")
        return self._intake.enter(name, directory)

    def _pin(self, name: str) -> None:
        if not self._residents.try_place(name, self._host_weights(name)):
            raise UnavailableError(f"adapter {name!r} cannot be pinned now: the device pool is in use")
        self._host.pin(name)
        self._residents[name].is_pinned = True

    @property
    def _num_pins(self) -> int:
        """In force or due."""
        return self._host.num_pinned + len(self._pins_due)

    def _try_due_pin(self, name: str) -> None:
        entry = self._intake.entries.get(name)
        if entry is None or entry.weights is None or not self._residents.try_place(name, entry.weights):
            return
        self._pin(name)
        self._pins_due.remove(name)
        # None of those is active, since the pinned one has found its room. They would wait for ever.
        for other in list(self._intake.entries.values()):
            if (
                other.weights is not None
                and not self._host[other.name].is_pinned
                and not self._residents.fits_beside_pinned(other.weights)
            ):
                self._intake.expel(other)

    def _host_weights(self, name: str) -> AdapterWeights:
        weights = self._intake.entries[name].weights
        assert weights is not None, f"{name} is not loaded"
        return weights

    def _reader(self, spec: ModelSpec, dtype: torch.dtype, *, pin: bool) -> Read:
        def read(directory: Path) -> AdapterWeights:
            weights, report = read_adapter(
                directory,
                spec,
                max_lora_rank=self.config.max_lora_rank,
                dtype=dtype,
                pin=pin,
                root=self.root.path,
            )
            for line in report.notes():
                log.warning("adapter %s: %s", directory.name, line)
            return weights

        return read
