"""What other threads say to the engine's thread, and the session that each of them holds.

Messages go into the engine's inbox; events come back through the session's `deliver`, once per step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from manylora.errors import ManyloraError
from manylora.messages import Cancel, Failed, Generate, Status, Tokens

log = logging.getLogger(__name__)

Event = Tokens | Failed
Deliver = Callable[[list[Event]], None]


class Session:
    """One user of an engine: a front end's connection or a caller in process. Made by `Engine.connect`."""

    def __init__(self, post: Callable[[EngineMessage], None], deliver: Deliver) -> None:
        self._post = post
        self._deliver = deliver
        # Below: the engine thread's.
        self.events: list[Event] = []

    def send(self, message: Generate | Cancel) -> None:
        """Hand a message to the engine. Thread-safe, never blocks; the answer comes through `deliver`."""
        self._post(Sent(self, message))

    def close(self) -> None:
        """Cancel all sequences of this session. Nothing is delivered any more."""
        self._deliver = _drop
        self._post(Closed(self))

    def fail(self, request_id: int, error: ManyloraError) -> None:
        """Note that a request ended with an error. Engine thread only."""
        self.events.append(Failed(request_id, error.code, error.message))

    def flush(self) -> None:
        """Deliver what the step left. Engine thread only."""
        events, self.events = self.events, []
        if events:
            try:
                self._deliver(events)
            except Exception:
                log.exception("a session's deliver callback failed")


def _drop(_events: list[Event]) -> None:
    """Where a closed session's events go."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A message of a session."""

    session: Session
    message: Generate | Cancel


@dataclass(frozen=True, slots=True)
class Closed:
    """A session has ended."""

    session: Session


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Somebody waits for a status."""

    answer: Future[Status]


@dataclass(frozen=True, slots=True)
class Wake:
    """A load has finished, or the engine is to end: look again."""


EngineMessage = Sent | Closed | StatusRequest | Wake
