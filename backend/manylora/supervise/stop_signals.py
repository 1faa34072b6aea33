"""The signals that ask `manylora serve` to stop."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignals:
    """Records SIGINT, SIGTERM and SIGHUP from its creation on, so that the program can stop in order."""

    def __init__(self) -> None:
        self._received: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._record)

    @property
    def first(self) -> int:
        """The first signal; 0 while there is none."""
        return self._received[0] if self._received else 0

    @property
    def is_urgent(self) -> bool:
        """Whether there was more than one."""
        return len(self._received) > 1

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
