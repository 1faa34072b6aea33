"""The state of all adapters, for clients, and the invariants of each version."""

from __future__ import annotations

from manylora.adapters.adapter import Adapter, Stage
from manylora.adapters.failures import Failures
from manylora.adapters.lookout import Lookout
from manylora.adapters.versions import Versions
from manylora.messages import AdapterState


def list_states(versions: Versions, lookout: Lookout, failures: Failures) -> list[AdapterState]:
    """See `Registry.states`."""
    current = versions.current
    states = [_state_of(adapter, versions, lookout.fault_of(name)) for name, adapter in current.items()]
    looked_for = lookout.names_looked_for()
    states += [AdapterState(name=name, state="loading") for name in looked_for]
    states += [
        AdapterState(name=name, state="failed")
        for name in failures
        if name not in current and name not in looked_for
    ]
    states += [_state_of(adapter, versions, "") for adapter in versions.outdated]
    return sorted(states, key=lambda state: (state.name, state.outdated))


def check_adapter(adapter: Adapter, versions: Versions) -> list[str]:
    """Broken invariants of one version."""
    leases = adapter.leases.values()
    is_queued, is_ready = adapter.stage is Stage.QUEUED, adapter.stage is Stage.READY
    claims = {
        # A load that stalls has given its slot back.
        "a slot exactly when it is not queued": (adapter in versions.host) != is_queued
        or adapter.stage is Stage.LOADING,
        "pages exactly while it is on the device": (adapter.placement is not None)
        == (adapter in versions.residents),
        "leases while it is queued": bool(leases) or adapter.is_update or not is_queued,
        "weights when it is ready, and not while it is read": is_queued
        or (adapter.weights is not None) == is_ready,
        "weights when it is an update": not adapter.is_update or adapter.weights is not None,
        "weights for those who have begun under it": adapter.is_whole
        or not any(lease.used_version for lease in leases),
        "one version for each who has begun": all(
            lease.used_version in ("", adapter.version) for lease in leases
        ),
        "a use per active lease": adapter.num_active == sum(lease.is_active for lease in leases),
        "pages while it is used or pinned": adapter.placement is not None
        or not (adapter.num_active or adapter.is_pinned),
        "the orders of its leases": adapter.orders == sorted(lease.order for lease in leases),
        "living leases of its own": all(
            lease.adapter is adapter and not lease.is_released and lease.error is None for lease in leases
        ),
    }
    return [f"adapter {adapter.name} has not {claim}" for claim, holds in claims.items() if not holds]


def _state_of(adapter: Adapter, versions: Versions, fault: str) -> AdapterState:
    """One version as clients see it."""
    is_outdated = adapter in versions.outdated
    if adapter.weights is None or adapter.stage is not Stage.READY:
        return AdapterState(name=adapter.name, state="loading", version=adapter.version, outdated=is_outdated)
    return AdapterState(
        name=adapter.name,
        state="device" if adapter in versions.residents else "host",
        version=adapter.weights.version,
        rank=adapter.weights.max_rank,
        num_bytes=adapter.weights.num_bytes,
        num_running=adapter.num_active,
        pinned=adapter.is_pinned,
        outdated=is_outdated,
        files_error=fault,
    )
