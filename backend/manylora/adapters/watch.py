"""What is known of the files behind one name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from manylora.adapters.adapter import Lease
from manylora.adapters.adapter_files import Sight, Stamp
from manylora.adapters.loader import Job


@dataclass(slots=True, eq=False)
class Watch:
    """What is known of the files behind one name."""

    name: str
    asking: dict[int, Lease] = field(default_factory=dict)
    """Leases that wait for the next look."""
    asked: dict[int, Lease] = field(default_factory=dict)
    """Those that wait for the look that goes on."""
    settling: dict[int, Lease] = field(default_factory=dict)
    """Those of an absent adapter that wait until its files have been left alone."""
    job: Job[Sight] | None = None
    """The look that goes on."""
    is_wanted: bool = False
    """A look is to begin, for nobody in particular."""
    looked_s: float = -math.inf
    """When the last look ended."""
    seen: Stamp | None = None
    """How changed files stood at the last look."""
    settled_s: float = 0.0
    """When they will have stood so for long enough to be read."""
    relook_s: float = math.inf
    """When to look again, whoever asks."""
    is_hung: bool = False
    """The look that goes on has been given up."""
    fault: str = ""
    """Why the files as they are cannot be served, while an older version is."""
    told: tuple[Stamp | None, str] = (None, "")
    """Of what the log has been told so."""

    @property
    def leases(self) -> list[Lease]:
        """All that wait."""
        return [*self.asking.values(), *self.asked.values(), *self.settling.values()]

    @property
    def is_asked_for(self) -> bool:
        """Whether a look is to begin at once."""
        return bool(self.asking) or self.is_wanted

    def forget(self, lease: Lease) -> None:
        """A lease waits no more."""
        lease.is_asking = False
        for leases in (self.asking, self.asked, self.settling):
            leases.pop(lease.number, None)
