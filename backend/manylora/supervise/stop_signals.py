"""The signals that ask `manylora serve` to stop."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP from when it is made, so that what must be tidied is tidied."""

    def __init__(self) -> None:
        self._received: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    @property
    def first(self) -> int:
        """The first one; 0 while there is none."""
        return self._received[0] if self._received else 0

    @property
    def is_urgent(self) -> bool:
        """Asked more than once."""
        return len(self._received) > 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
