"""A sequence's hold on an adapter, and the adapter's state that all its leases share."""

from __future__ import annotations

import bisect
import enum
from dataclasses import dataclass, field
from pathlib import Path

from manylora.adapters.device_pool import Placement, needed_pages
from manylora.adapters.weights import AdapterWeights
from manylora.errors import ManyloraError

Order = tuple[int, int]
"""(-priority, number): what comes first sorts first. The scheduler's queue has the same order."""


class Stage(enum.Enum):
    """How far an adapter is on its way from disk to host memory."""

    QUEUED = "queued"
    """Waits for a slot in the host cache, or for a thread of the loader."""
    LOADING = "loading"
    """Is being read into its slot."""
    READY = "ready"
    """Is in host memory."""


@dataclass(slots=True, eq=False)
class Entry:
    """One adapter that is wanted or held. The registry changes it; absent and failed adapters have none."""

    name: str
    directory: Path
    stage: Stage = Stage.QUEUED
    leases: dict[int, Lease] = field(default_factory=dict)
    """By number."""
    orders: list[Order] = field(default_factory=list)
    """Of the leases, sorted."""
    lacks_slot: bool = True
    """While queued: a thread of the loader would not do, the host cache has no slot for it now."""
    num_active: int = 0
    """Leases in active use."""
    weights: AdapterWeights | None = None
    placement: Placement | None = None
    """Where it lies in the device pool, while a lease is in active use."""

    @property
    def first(self) -> Order:
        """Order of the lease that comes first. Only for entries with leases."""
        return self.orders[0]

    def add(self, lease: Lease) -> None:
        """Take in a lease."""
        self.leases[lease.number] = lease
        bisect.insort(self.orders, lease.order)

    def drop(self, lease: Lease) -> None:
        """Let a lease go."""
        del self.leases[lease.number]
        del self.orders[bisect.bisect_left(self.orders, lease.order)]


class Lease:
    """Made by `Registry.acquire`, ended by `Registry.release`. Only the registry changes it."""

    __slots__ = (
        "adapter_id",
        "entry",
        "error",
        "is_active",
        "is_released",
        "number",
        "order",
        "used_version",
    )

    def __init__(self, number: int, entry: Entry, priority: int = 0) -> None:
        self.number = number
        """Counts up: a lower number has waited longer."""
        self.order: Order = (-priority, number)
        """Its place among all leases: higher priority first, then who has waited longer."""
        self.adapter_id = entry.name
        self.entry: Entry | None = entry
        """None once the lease has failed or ended."""
        self.error: ManyloraError | None = None
        """Why it failed."""
        self.is_active = False
        self.is_released = False
        self.used_version = ""
        """The version at its first activation; another one must not go on with what that began."""

    @property
    def state(self) -> str:
        """`queued` (without a host slot), `loading` (being read or next to be), `ready` or `failed`."""
        if self.error is not None:
            return "failed"
        assert self.entry is not None, "the lease has ended"
        if self.entry.stage is Stage.QUEUED and not self.entry.lacks_slot:
            # The scheduler lets others pass it as it does during the load: it wants no place of theirs.
            return Stage.LOADING.value
        return self.entry.stage.value

    @property
    def weights(self) -> AdapterWeights | None:
        """The adapter in host memory; None unless ready."""
        return self.entry.weights if self.entry is not None else None

    @property
    def version(self) -> str:
        """Content hash of the adapter; empty unless ready."""
        return self.weights.version if self.weights is not None else ""

    @property
    def scale(self) -> float:
        """The adapter's own scaling. Only when ready."""
        assert self.weights is not None, "the adapter is not loaded"
        return self.weights.scale

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages by kind that the adapter takes in the device pool. Only when ready."""
        assert self.weights is not None, "the adapter is not loaded"
        return needed_pages(self.weights)

    @property
    def placement(self) -> Placement | None:
        """Where the adapter lies in the device pool; None unless this lease is in active use."""
        return self.entry.placement if self.entry is not None and self.is_active else None
