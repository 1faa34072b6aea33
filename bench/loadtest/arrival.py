"""When requests come: all at once, at random at a rate, or from clients that each wait for their answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrival:
    """A process by which requests arrive."""

    rate_per_s: float = 0.0
    """Requests a second, at exponentially distributed distances. 0: all are due at the start."""
    num_clients: int = 0
    """Clients that send their next request when they have their answer. 0: nobody waits."""

    def __post_init__(self) -> None:
        if self.rate_per_s < 0 or not math.isfinite(self.rate_per_s):
            raise ValueError(f"rate {self.rate_per_s}: must be 0 or more")
        if self.num_clients < 0:
            raise ValueError(f"{self.num_clients} clients: must be 0 or more")
        if self.rate_per_s and self.num_clients:
            raise ValueError("a rate and a number of clients exclude each other")

    @property
    def kind(self) -> str:
        """at-once, poisson or closed."""
        if self.rate_per_s:
            return "poisson"
        return "closed" if self.num_clients else "at-once"

    @property
    def label(self) -> str:
        """For tables."""
        if self.rate_per_s:
            return f"{self.rate_per_s:g}/s"
        return f"{self.num_clients} client{'s' * (self.num_clients > 1)}" if self.num_clients else "at once"

    def max_in_flight(self, num_requests: int) -> int:
        """How many requests can be under way together."""
        return min(self.num_clients or num_requests, num_requests)

    def due_times(self, num_requests: int, seed: int) -> list[float]:
        """When each request may be sent at the earliest.

        Returns:
            Seconds after the start, not falling, the first 0.
        """
        if not self.rate_per_s:
            return [0.0] * num_requests
        gaps = np.random.default_rng([seed, 2]).exponential(1 / self.rate_per_s, num_requests)
        gaps[:1] = 0.0
        return [float(due) for due in np.cumsum(gaps)]
