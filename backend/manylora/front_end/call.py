"""One request in flight in a front end: its sequences, and where its replies go."""

from __future__ import annotations

import math
from dataclasses import dataclass

from manylora.front_end.answer import GrowingAnswer
from manylora.front_end.responder import Responder


@dataclass(eq=False, slots=True)
class Call:
    """One request: N sequences and one responder."""

    responder: Responder
    answers: list[GrowingAnswer]
    """One for each sequence, in the order of the prompts."""
    has_ended: bool = False
    """It has failed, and its last reply has been sent or is about to be. Set by the reply loop; read by the
    thread that starts its sequences."""

    @property
    def has_finished(self) -> bool:
        return all(answer.finish_reason for answer in self.answers)

    @property
    def next_deadline(self) -> GrowingAnswer | None:
        """The sequence that runs out of time first, of those that have a deadline and have not finished."""
        timed = [a for a in self.answers if not a.finish_reason and a.deadline_s < math.inf]
        return min(timed, key=lambda answer: answer.deadline_s, default=None)
