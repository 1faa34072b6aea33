"""Which sequences have run out of time. Plain Python, owned by the engine thread."""

from __future__ import annotations

import math
from collections.abc import Iterable

from manylora.engine.sequence import Sequence, State
from manylora.errors import UnavailableError


class Deadlines:
    """The deadlines of a scheduler's sequences.

    Between two passing deadlines a look costs one comparison: only the next one is kept, and it may belong to
    a sequence that has ended, which costs one look in vain.
    """

    def __init__(self) -> None:
        self.next_s = math.inf
        """No live sequence's deadline passes before this moment, on the monotonic clock."""
        self.num_missed = 0

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence."""
        if sequence.deadline_s > 0:
            self.next_s = min(self.next_s, sequence.deadline_s)

    def pop_missed(self, sequences: Iterable[Sequence], now_s: float) -> list[Sequence]:
        """Those of all live `sequences` whose deadline has passed; each is to be ended now."""
        if now_s < self.next_s:
            return []
        timed = [s for s in sequences if s.deadline_s > 0]
        self.next_s = min((s.deadline_s for s in timed if s.deadline_s > now_s), default=math.inf)
        missed = [s for s in timed if s.deadline_s <= now_s]
        self.num_missed += len(missed)
        return missed


def error_of(sequence: Sequence) -> UnavailableError:
    """The error for a sequence that has missed its deadline. Call it before the sequence is ended."""
    if sequence.state is State.RUNNING or sequence.num_generated:
        when = f"after {sequence.num_generated} of {sequence.params.max_tokens} tokens"
    elif sequence.lease is not None and sequence.lease.state in ("queued", "loading"):
        when = f"while waiting for adapter {sequence.adapter_id!r} to load"
    else:
        when = "while waiting"
    return UnavailableError(f"deadline_ms={sequence.deadline_ms} passed {when}")
