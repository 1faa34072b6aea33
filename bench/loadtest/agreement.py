"""Whether two targets gave the same tokens, ties apart.

Logits of two computations in another order differ a little, so where a reference's own two best lie closer
than `TIE` either token may come first, and what follows cannot be compared any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

TIE = 1e-3
"""Difference of two float32 logits below which either may win."""
MAX_TIE_SHARE = 0.01
"""Of sequences; one is always allowed."""


@dataclass(slots=True)
class Agreement:
    """How one target's answers compare with the reference's."""

    num_compared: int = 0
    num_ties: int = 0
    differences: list[str] = field(default_factory=list)
    """One line for each sequence that differs where there is no tie."""

    @property
    def is_good(self) -> bool:
        return not self.differences and self.num_ties <= max(1, MAX_TIE_SHARE * self.num_compared)

    def __str__(self) -> str:
        same = self.num_compared - self.num_ties - len(self.differences)
        text = f"{same} of {self.num_compared} answers the same"
        if self.num_ties:
            text += f", {self.num_ties} part{'s' * (self.num_ties == 1)} at a tie"
        return f"{text}, {len(self.differences)} differ" if self.differences else text


def first_difference(found: Sequence[int], wanted: Sequence[int]) -> int | None:
    """The first place where two answers differ; None if they are the same."""
    pairs = itertools.zip_longest(found, wanted)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), None)


def compare(
    found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], gap: Callable[[int, int], float]
) -> Agreement:
    """Compare answers.

    Args:
        found: a target's, one for each request.
        wanted: the reference's.
        gap: given a request's index and a place in its answer, by how much the reference's best logit leads
            there. Asked only where answers differ.
    """
    agreement = Agreement(num_compared=len(wanted))
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        place = first_difference(one, other)
        if place is None:
            continue
        if place >= len(one) or place >= len(other):
            agreement.differences.append(f"request {index}: {len(one)} tokens, {len(other)} wanted")
            continue
        lead = gap(index, place)
        if lead < TIE:
            agreement.num_ties += 1
        else:
            agreement.differences.append(
                f"request {index}: token {place} is {one[place]}, wanted {other[place]}, "
                f"which leads by {lead:.2g}"
            )
    return agreement
