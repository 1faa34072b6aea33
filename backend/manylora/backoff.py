"""Pauses between attempts at what has failed."""

from __future__ import annotations


class Backoff:
    """Pauses that double from failure to failure: `first_s`, 2 * `first_s`, 4 * `first_s` .. `max_s`.

    Args:
        first_s: seconds, the first pause.
        max_s: seconds, the longest one.
        steady_s: seconds of success after which a failure begins a new series.
        num_immediate: failures at the beginning of a series that are followed by no pause.
    """

    def __init__(
        self, *, first_s: float, max_s: float, steady_s: float = float("inf"), num_immediate: int = 0
    ) -> None:
        self.num_failures = 0
        """Of this series."""
        self._first_s = first_s
        self._max_s = max_s
        self._steady_s = steady_s
        self._num_immediate = num_immediate

    def fail(self, succeeded_s: float = 0.0) -> float:
        """Count a failure.

        Args:
            succeeded_s: seconds for which all was well before it.

        Returns: seconds to wait before the next attempt.
        """
        if succeeded_s > self._steady_s:
            self.num_failures = 0
        self.num_failures += 1
        exponent = self.num_failures - 1 - self._num_immediate
        if exponent < 0:
            return 0.0
        # Past 2 ** 60 every bound is reached, and a float would overflow in the end.
        return float(min(self._first_s * 2 ** min(exponent, 60), self._max_s))
