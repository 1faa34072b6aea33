"""Which adapters running sequences use: at most `max_loras` in a step. Plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from manylora.engine.sequence import Sequence

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter, Lease
    from manylora.adapters.placement import AdapterUse


class Activator(Protocol):
    """What the scheduler asks of adapters.registry.Registry."""

    def try_activate(self, lease: Lease, /) -> AdapterUse | None: ...
    def deactivate(self, lease: Lease, /) -> None: ...
    def is_copied(self, lease: Lease, /) -> bool: ...
    def await_copy(self, lease: Lease, /) -> None: ...


class ActiveAdapters:
    """Counts the running sequences of each adapter. A sequence of the base model is of no account here.

    Args:
        registry: brings adapters to the device.
        max_loras: adapters in use at a time.
    """

    def __init__(self, registry: Activator, max_loras: int) -> None:
        self.registry = registry
        self.max_loras = max_loras
        self._num_uses: Counter[Adapter] = Counter()
        """By adapter and version: two versions of one are two in a step."""

    def try_activate(self, sequence: Sequence) -> bool:
        """Let a sequence use its adapter; False if that is not ready or finds no room now."""
        if sequence.lease is None or sequence.lease.state != "ready":
            return False
        adapter = _adapter_of(sequence)
        if adapter not in self._num_uses and len(self._num_uses) >= self.max_loras:
            return False
        sequence.adapter = self.registry.try_activate(sequence.lease)
        if sequence.adapter is None:
            return False
        self._num_uses[adapter] += 1
        return True

    def deactivate(self, sequence: Sequence) -> None:
        """End a sequence's use of its adapter."""
        if sequence.lease is None:
            return
        adapter = _adapter_of(sequence)
        self._num_uses[adapter] -= 1
        if not self._num_uses[adapter]:
            del self._num_uses[adapter]
        self.registry.deactivate(sequence.lease)
        sequence.adapter = None

    def check(self, running: Iterable[Sequence]) -> list[str]:
        """Broken invariants, given all sequences that run."""
        wrong = []
        counted = Counter(_adapter_of(s) for s in running if s.lease is not None)
        if counted != self._num_uses:
            wrong.append(f"active adapters {dict(self._num_uses)}, found {dict(counted)}")
        if len(counted) > self.max_loras:
            wrong.append(f"{len(counted)} adapters run, max_loras={self.max_loras}")
        return wrong


def _adapter_of(sequence: Sequence) -> Adapter:
    """What takes one of `max_loras` in a step: whatever has a placement of its own."""
    assert sequence.lease is not None, "a sequence without an adapter"
    assert sequence.lease.adapter is not None, "a running sequence's adapter is gone"
    return sequence.lease.adapter
