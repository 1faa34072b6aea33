"""Detects a thread that is stuck in one turn of its loop."""

from __future__ import annotations

LOOK_S = 1.0
"""Between two looks."""
MAX_BLOCKED_LOOKS = 120
"""Looks in a row at the same turn while the process uses almost no processor time: a deadlock, or a disk that
no longer answers. A step that computes, however slowly, never counts."""
MAX_BUSY_LOOKS = 3600
"""Looks in a row at the same turn while the process computes. No step takes an hour."""
MIN_CPU_S = 0.05
"""Processor time between two looks below which the process counts as idle: several times what a process that
only waits uses, and a twentieth of what one busy thread gets."""


class HangDetector:
    """Judges one loop by the number of its turns.

    It counts looks instead of comparing times, so a pause of the whole machine is one look and no reason to
    end a healthy process.
    """

    def __init__(self) -> None:
        self._num_turns = -1
        self._cpu_s = 0.0
        self._num_blocked = 0
        self._num_looks = 0

    def is_stuck(self, num_turns: int, cpu_s: float) -> bool:
        """Look.

        Args:
            num_turns: turns of the loop so far. An idle loop must be woken for each look.
            cpu_s: processor time of the whole process so far.
        """
        used_s = cpu_s - self._cpu_s
        self._cpu_s = cpu_s
        if num_turns != self._num_turns:
            self._num_turns = num_turns
            self._num_blocked = self._num_looks = 0
            return False
        self._num_looks += 1
        self._num_blocked = self._num_blocked + 1 if used_s < MIN_CPU_S else 0
        return self._num_blocked >= MAX_BLOCKED_LOOKS or self._num_looks >= MAX_BUSY_LOOKS
