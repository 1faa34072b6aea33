"""The seam between the benchmark and what it measures."""

from __future__ import annotations

from typing import Protocol

from bench.loadtest.driver import Progress
from bench.loadtest.record import Round
from bench.loadtest.workload import Case

TokenIds = list[int]


class Target(Protocol):
    """Something that answers requests."""

    @property
    def name(self) -> str:
        """As asked for on the command line."""

    def run(self, case: Case, progress: Progress) -> Round:
        """Answer a whole case."""


class Reference(Protocol):
    """A target whose tokens are the measure of the others'."""

    name: str

    def run(self, case: Case, progress: Progress) -> Round:
        """See Target."""

    def gap(self, prompt: TokenIds, adapter: str) -> float:
        """By how much the likeliest next token's logit leads the second one's, ends of sequence left out."""

    def close(self) -> None:
        """Free what it holds."""


def growth(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What counters have grown by."""
    return {name: count - before.get(name, 0) for name, count in after.items()}
