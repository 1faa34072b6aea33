"""One version of an adapter: everything known about it, from its files to its pages, and the leases on it."""

from __future__ import annotations

import bisect
import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manylora.adapters.adapter_files import Sight
from manylora.adapters.placement import AdapterUse, Placement
from manylora.errors import InvalidArgumentError, ManyloraError

if TYPE_CHECKING:
    from manylora.adapters.weights import AdapterWeights

Order = tuple[float, int]
"""(-priority, number): what comes first sorts first. The scheduler's queue has the same order."""

LAST: Order = (math.inf, 0)
"""The order of an adapter that nobody waits for."""


class Stage(enum.Enum):
    """How far a version is on its way from disk to host memory."""

    QUEUED = "queued"
    """Waiting for a slot in the host cache, or for a thread of the loader."""
    LOADING = "loading"
    """Being read, into its slot or beside the cache."""
    READY = "ready"
    """In host memory."""


@dataclass(slots=True, eq=False)
class Adapter:
    """One version of an adapter that is wanted or held; before its first load, the version which that will
    give.

    Only the registry changes it. Absent and failed adapters have no record. `HostCache` and `Residents` know
    which ones have a slot in host memory and pages on the device, in order of use.
    """

    name: str
    sight: Sight
    """How its files stood when it was read; before that, when its load was queued."""
    stage: Stage = Stage.QUEUED
    leases: dict[int, Lease] = field(default_factory=dict)
    """By number."""
    orders: list[Order] = field(default_factory=list)
    """Of the leases, sorted."""
    lacks_slot: bool = True
    """While queued: it waits for a slot in the host cache, not just for a thread of the loader."""
    num_active: int = 0
    """Leases in active use."""
    weights: AdapterWeights | None = None
    """What was read. Set while queued if it cannot, or need not, be read again: its slot will hold it."""
    is_update: bool = False
    """A new version read beside the cache, where its predecessor may still be; it has had no slot yet."""
    is_stale: bool = False
    """Its files have changed since it was read, so it could not be read again."""
    is_pinned: bool = False
    """On both levels."""
    placement: Placement | None = None
    """Where it lies in the device pool, while it is there."""

    def __str__(self) -> str:
        return f"{self.name} {self.version[:12]}" if self.weights else self.name

    @property
    def is_whole(self) -> bool:
        """Whether it has been read."""
        return self.weights is not None

    @property
    def version(self) -> str:
        """Content hash; empty before it has been read."""
        return self.weights.version if self.weights else ""

    @property
    def use(self) -> AdapterUse:
        """What steps need to know of it. Only while it is on the device."""
        assert self.weights is not None, f"{self} is not loaded"
        assert self.placement is not None, f"{self} is not on the device"
        return AdapterUse(self.version, self.weights.scale, self.placement.pages)

    def refusal_of(self, adapter_scale: float) -> ManyloraError | None:
        """Why the adapter cannot be applied with this strength; None if it can. Only while it is loaded.

        Scale and offset hold at strength 1: PEFT scales what they were derived from, magnitudes of a sum of
        base and term, in a way that no blend of the vectors gives. At 0 the base model answers.
        """
        assert self.weights is not None, f"{self} is not loaded"
        if adapter_scale in (0.0, 1.0) or not self.weights.has_vectors:
            return None
        return InvalidArgumentError(
            f"adapter {self.name!r} has factors or addends of outputs, which hold as they were trained: "
            f"adapter_scale={adapter_scale:g} cannot be applied to it, allowed are 0 and 1"
        )

    @property
    def is_idle(self) -> bool:
        """Whether it is in host memory and may be evicted."""
        return self.stage is Stage.READY and not self.leases and not self.is_pinned

    @property
    def first(self) -> Order:
        """Order of the lease that comes first."""
        return self.orders[0] if self.orders else LAST

    def add(self, lease: Lease) -> None:
        """Add a lease."""
        lease.adapter = self
        self.leases[lease.number] = lease
        bisect.insort(self.orders, lease.order)

    def drop(self, lease: Lease) -> None:
        """Remove a lease."""
        lease.adapter = None
        del self.leases[lease.number]
        del self.orders[bisect.bisect_left(self.orders, lease.order)]


class Lease:
    """A sequence's hold on an adapter. Made by `Registry.acquire`, ended by `Registry.release`.

    Only the registry changes it.
    """

    __slots__ = (
        "adapter",
        "adapter_id",
        "awaits_look",
        "error",
        "give_up_s",
        "is_active",
        "is_released",
        "number",
        "order",
        "used_version",
    )

    def __init__(self, number: int, adapter_id: str, priority: int = 0) -> None:
        self.number = number
        """Counts up: a lower number has waited longer."""
        self.order: Order = (-priority, number)
        """Its place among all leases: higher priority first, then who has waited longer."""
        self.adapter_id = adapter_id
        self.adapter: Adapter | None = None
        """None until the adapter's files have been found, and once the lease has failed or ended."""
        self.error: ManyloraError | None = None
        """Why it failed."""
        self.give_up_s = math.inf
        """How long it waits for files that are being written, on the clock."""
        self.awaits_look = False
        """It is to see the outcome of a look at the adapter's files first."""
        self.is_active = False
        self.is_released = False
        self.used_version = ""
        """The version at its first activation, which it keeps."""

    @property
    def state(self) -> str:
        """`queued` (without a host slot), `loading` (looked for, being read or next to be read), `ready` or
        `failed`."""
        if self.error is not None:
            return "failed"
        assert not self.is_released, "the lease has ended"
        if self.awaits_look or self.adapter is None:
            return Stage.LOADING.value
        if self.adapter.stage is Stage.QUEUED and not self.adapter.lacks_slot:
            # The scheduler lets others pass it, as during a load: it competes with nobody for a slot.
            return Stage.LOADING.value
        return self.adapter.stage.value

    @property
    def weights(self) -> AdapterWeights | None:
        """The adapter in host memory; None unless ready."""
        adapter = self.adapter
        return adapter.weights if adapter is not None and adapter.stage is Stage.READY else None

    @property
    def version(self) -> str:
        """Content hash of the adapter; empty unless ready or used before."""
        return self.used_version or (self.weights.version if self.weights is not None else "")

    def refusal_of(self, adapter_scale: float) -> ManyloraError | None:
        """As of the adapter. Only when ready."""
        assert self.adapter is not None, "the adapter is not loaded"
        return self.adapter.refusal_of(adapter_scale)

    @property
    def scale(self) -> float:
        """The adapter's own scaling. Only when ready."""
        assert self.weights is not None, "the adapter is not loaded"
        return self.weights.scale

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages by group that the adapter takes in the device pool. Only when ready."""
        assert self.weights is not None, "the adapter is not loaded"
        return self.weights.num_pages

    @property
    def placement(self) -> Placement | None:
        """Where the adapter lies in the device pool; None unless this lease is in active use."""
        return self.adapter.placement if self.adapter is not None and self.is_active else None
