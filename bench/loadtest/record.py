"""What was seen of one request, and of one run of a workload."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """One request as its sender saw it. Times are of `time.perf_counter`."""

    due_s: float
    """When it should have been sent: a sender that comes late makes the answer late."""
    is_streamed: bool
    """Whether tokens arrive as they are made. If not, only the end of the answer can be timed."""
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Of each reply with tokens: when, and how many."""
    error: str = ""
    """The failure's code; empty: none."""
    end_s: float = 0.0

    def add(self, now_s: float, token_ids: list[int]) -> None:
        """Take a reply's tokens."""
        self.token_ids += token_ids
        self.arrivals.append((now_s, len(token_ids)))
        self.end_s = now_s

    def fail(self, now_s: float, code: str) -> None:
        self.error = code
        self.end_s = now_s

    @property
    def latency_s(self) -> float:
        """From due to the last token."""
        return self.end_s - self.due_s

    def first_token_s(self) -> float | None:
        """From due to the first token."""
        return self.arrivals[0][0] - self.due_s if self.is_streamed and self.arrivals else None

    def between_tokens_s(self) -> list[float]:
        """For each token but the first reply's: the wait for its reply, shared by the reply's tokens."""
        if not self.is_streamed:
            return []
        waits: list[float] = []
        for (before_s, _), (now_s, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            waits += [(now_s - before_s) / count] * count
        return waits


@dataclass(frozen=True, slots=True)
class Round:
    """One run of a workload by one target."""

    records: list[Record]
    begin_s: float
    counters: dict[str, int]
    """What the engine's counters have grown by; empty where they cannot be seen."""

    @property
    def duration_s(self) -> float:
        return max(record.end_s for record in self.records) - self.begin_s

    @property
    def requests_per_s(self) -> float:
        return sum(not record.error for record in self.records) / self.duration_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of the answers that came in full."""
        return sum(len(record.token_ids) for record in self.records if not record.error) / self.duration_s

    def errors(self) -> Counter[str]:
        return Counter(record.error for record in self.records if record.error)
