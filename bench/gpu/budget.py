"""Time for the parts of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Clock = Callable[[], float]


class Deadline:
    """When a part begins nothing more."""

    def __init__(self, at_s: float, clock: Clock = time.monotonic) -> None:
        self._at_s, self._clock = at_s, clock

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """So many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left_s(self) -> float:
        """Seconds, not below 0."""
        return max(0.0, self._at_s - self._clock())

    @property
    def is_over(self) -> bool:
        """Whether nothing more is begun."""
        return self.left_s == 0


class Budget:
    """Seconds for a run. A part has as many as its share says; what it leaves goes to those after it.

    Args:
        total_s: of all parts together.
        shares: of each part, in the order in which they run; the last has all that is left.
        reserved_s: what some parts have beside their share, so that those before cannot use it up.
    """

    def __init__(
        self,
        total_s: float,
        shares: dict[str, float],
        clock: Clock = time.monotonic,
        reserved_s: Mapping[str, float] | None = None,
    ) -> None:
        self._clock, self._end_s = clock, clock() + total_s
        self._shares, self._reserved_s = dict(shares), dict(reserved_s or {})

    def begin(self, part: str) -> Deadline:
        """The next part begins: of what is left, it may use its share among the parts still to come.

        Raises:
            ValueError: a part that the budget does not have, or one that has begun before.
        """
        if part not in self._shares:
            raise ValueError(f"part: found {part!r}, allowed {sorted(self._shares)}")
        now = self._clock()
        while next(iter(self._shares)) != part:
            del self._shares[next(iter(self._shares))]
        left_s = max(0.0, self._end_s - now)
        shared_s = max(0.0, left_s - sum(self._reserved_s.get(name, 0.0) for name in self._shares))
        mine_s = self._reserved_s.get(part, 0.0) + shared_s * self._shares[part] / sum(self._shares.values())
        del self._shares[part]
        return Deadline(now + (min(left_s, mine_s) if self._shares else left_s), self._clock)
