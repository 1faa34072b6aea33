"""What can be seen of one version of an adapter in the registry, and what may be wrong with it."""

from __future__ import annotations

from manylora.adapters.host_cache import HostCache
from manylora.adapters.lease import Entry, Stage
from manylora.adapters.residents import Residents
from manylora.adapters.versions import Versions
from manylora.adapters.weights import AdapterWeights
from manylora.messages import AdapterState


def state_of(entry: Entry, versions: Versions, fault: str) -> AdapterState:
    """The version as clients see it.

    Args:
        fault: why the files as they are cannot be served.
    """
    is_outdated = entry in versions.outdated
    if entry.weights is None:
        return AdapterState(name=entry.name, state="loading", version=entry.version, outdated=is_outdated)
    return AdapterState(
        name=entry.name,
        state="device" if entry in versions.residents else "host",
        version=entry.weights.version,
        rank=entry.weights.max_rank,
        num_bytes=entry.weights.num_bytes,
        num_running=entry.num_active,
        pinned=versions.host[entry].is_pinned,
        outdated=is_outdated,
        files_error=fault,
    )


def check_entry(
    entry: Entry, host: HostCache[Entry, AdapterWeights], residents: Residents[Entry]
) -> list[str]:
    """Broken invariants of the version's entry against both levels."""
    slot = host.get(entry)
    resident = residents.get(entry)
    active = sum(lease.is_active for lease in entry.leases.values())
    uses = resident.num_uses if resident is not None else 0
    claims = {
        # One that is being read has given its slot back if it stalls.
        "a slot exactly when it is not queued": (slot is None) == (entry.stage is Stage.QUEUED)
        or entry.stage is Stage.LOADING,
        "leases while it is queued": bool(entry.leases) or entry.is_update or entry.stage is not Stage.QUEUED,
        "weights exactly when it is ready": (entry.weights is not None) == (entry.stage is Stage.READY),
        "weights in hand only while it is queued": entry.in_hand is None or entry.stage is Stage.QUEUED,
        "weights in hand when it is an update": not entry.is_update or entry.in_hand is not None,
        "weights for those who have begun under it": entry.is_whole
        or not any(lease.used_version for lease in entry.leases.values()),
        "its weights in its slot": slot is None or slot.value is entry.weights,
        "a reference per lease": slot is None or slot.num_refs == len(entry.leases),
        "one version for each who has begun": all(
            lease.used_version in ("", entry.version) for lease in entry.leases.values()
        ),
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
