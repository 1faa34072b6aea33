"""Remembers which adapters could not be loaded, so that a broken one is not read again for every request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from manylora.adapters.adapter_files import Stamp
from manylora.backoff import Backoff
from manylora.errors import ManyloraError, from_code

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
MAX_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class _Failure:
    error: ManyloraError
    stamp: Stamp | None
    backoff: Backoff
    retry_at_s: float


class Failures:
    """The last failure of each adapter, which holds for its files as they were then.

    While they stay the same, the pause before the next attempt doubles: 1, 2, 4 .. 60 s. Once they change,
    the failure no longer applies.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, _Failure] = OrderedDict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._failures)

    def remember(self, name: str, error: ManyloraError, stamp: Stamp | None = None) -> None:
        """Begin a pause.

        Args:
            stamp: of the files that were read.
        """
        last = self._failures.pop(name, None)
        if last is not None and last.stamp == stamp:
            backoff = last.backoff
        else:
            backoff = Backoff(first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S)
        self._failures[name] = _Failure(error, stamp, backoff, self._clock() + backoff.fail())
        while len(self._failures) > MAX_REMEMBERED:
            self._failures.popitem(last=False)

    def recall(self, name: str, stamp: Stamp | None = None) -> ManyloraError | None:
        """The failure as a new error, while its pause lasts and the files have this stamp; otherwise None."""
        failure = self._failures.get(name)
        if failure is None or failure.stamp != stamp or self._clock() >= failure.retry_at_s:
            return None
        # A new object: one that is raised repeatedly would accumulate tracebacks.
        return from_code(failure.error.code, failure.error.message)

    def forget(self, name: str) -> None:
        """Forget the failure: the adapter could be loaded, or no longer exists."""
        self._failures.pop(name, None)
