"""One session of an engine, as the tests of the engine use it."""

from __future__ import annotations

import queue

from manylora import Engine
from manylora.messages import Failed, Tokens

PATIENCE_S = 120.0
"""A test that waits this long for an event has failed."""


class Inbox:
    """Events of a session, by sequence."""

    def __init__(self, engine: Engine) -> None:
        self.events: queue.SimpleQueue[Tokens | Failed] = queue.SimpleQueue()
        self.session = engine.connect(lambda events: [self.events.put(e) for e in events])

    def until_end(self, *ids: int) -> dict[int, Tokens | Failed]:
        """The last event of each sequence."""
        last: dict[int, Tokens | Failed] = {}
        while set(last) != set(ids):
            event = self.events.get(timeout=PATIENCE_S)
            if isinstance(event, Failed) or event.finish_reason:
                assert event.id not in last, "two ends"
                last[event.id] = event
        return last
