"""What is known about the files behind one name, and who waits for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from manylora.adapters.adapter import Lease
from manylora.adapters.adapter_files import Sight, Stamp
from manylora.adapters.loader import Job


@dataclass(slots=True, eq=False)
class Watch:
    """What is known about the files behind one name, and who waits for them."""

    name: str
    for_next_look: dict[int, Lease] = field(default_factory=dict)
    """Leases that wait for the next look to begin and end."""
    for_this_look: dict[int, Lease] = field(default_factory=dict)
    """Leases that wait for the current look."""
    settling: dict[int, Lease] = field(default_factory=dict)
    """Leases on an absent adapter whose files are being written."""
    job: Job[Sight] | None = None
    """The current look."""
    is_wanted: bool = False
    """A look is due although no lease waits for it."""
    looked_s: float = -math.inf
    """When the last look ended."""
    seen: Stamp | None = None
    """Stamp of changed files at the last look."""
    settled_s: float = 0.0
    """When they will have been unchanged for long enough to be read."""
    relook_s: float = math.inf
    """When to look again, whether or not a request arrives."""
    is_hung: bool = False
    """The current look has failed as hung."""
    fault: str = ""
    """Why the current files cannot be served, while an older version is."""
    logged: tuple[Stamp | None, str] = (None, "")
    """Stamp and message of the fault that the log has."""

    @property
    def leases(self) -> list[Lease]:
        """All leases that wait."""
        return [*self.for_next_look.values(), *self.affected]

    @property
    def affected(self) -> list[Lease]:
        """Those for which the current look decides."""
        return [*self.for_this_look.values(), *self.settling.values()]

    @property
    def is_due(self) -> bool:
        """Whether a look should begin at once."""
        return bool(self.for_next_look) or self.is_wanted

    def forget(self, lease: Lease) -> None:
        """Remove a lease that no longer waits."""
        lease.awaits_look = False
        for leases in (self.for_next_look, self.for_this_look, self.settling):
            leases.pop(lease.number, None)
