"""What can be seen of one adapter in the registry, and what may be wrong with it."""

from __future__ import annotations

from manylora.adapters.host_cache import HostCache
from manylora.adapters.lease import Entry, Stage
from manylora.adapters.residents import Residents
from manylora.adapters.weights import AdapterWeights
from manylora.messages import AdapterState


def state_of(entry: Entry, host: HostCache[AdapterWeights], residents: Residents) -> AdapterState:
    """The adapter as clients see it."""
    if entry.weights is None:
        return AdapterState(name=entry.name, state="loading")
    return AdapterState(
        name=entry.name,
        state="device" if entry.name in residents else "host",
        version=entry.weights.version,
        rank=entry.weights.max_rank,
        num_bytes=entry.weights.num_bytes,
        num_running=entry.num_active,
        pinned=host[entry.name].is_pinned,
    )


def check_entry(entry: Entry, host: HostCache[AdapterWeights], residents: Residents) -> list[str]:
    """Broken invariants of the adapter's entry against both levels."""
    slot = host.get(entry.name)
    resident = residents.get(entry.name)
    active = sum(lease.is_active for lease in entry.leases.values())
    uses = resident.num_uses if resident is not None else 0
    claims = {
        "a slot exactly when it is not queued": (slot is None) == (entry.stage is Stage.QUEUED),
        "leases while it is queued": bool(entry.leases) or entry.stage is not Stage.QUEUED,
        "weights exactly when it is ready": (entry.weights is not None) == (entry.stage is Stage.READY),
        "its weights in its slot": slot is None or slot.value is entry.weights,
        "a reference per lease": slot is None or slot.num_refs == len(entry.leases),
        "a use per active lease": active == entry.num_active == uses,
        "a placement exactly while it is active": (entry.placement is not None) == (active > 0),
        "its resident's placement": entry.placement is None
        or (resident is not None and entry.placement is resident.placement),
        "pins on both levels or none": (slot is not None and slot.is_pinned)
        == (resident is not None and resident.is_pinned),
        "the orders of its leases": entry.orders == sorted(lease.order for lease in entry.leases.values()),
        "living leases of its own": all(
            lease.entry is entry and not lease.is_released and lease.error is None
            for lease in entry.leases.values()
        ),
    }
    return [f"adapter {entry.name} has not {claim}" for claim, holds in claims.items() if not holds]
