"""Which session gets the answer of which sequence. Owned by the engine thread."""

from __future__ import annotations

from manylora.engine.sequence import Sequence, State
from manylora.engine.session import Session
from manylora.errors import ManyloraError


class Requests:
    """The sequences that have not ended, and the sessions that wait for their answers."""

    def __init__(self) -> None:
        self._sessions: dict[int, Session] = {}
        self._by_session: dict[Session, dict[int, Sequence]] = {}

    def add(self, session: Session, sequence: Sequence) -> None:
        """Note whose sequence this is."""
        self._sessions[sequence.id] = session
        self._by_session.setdefault(session, {})[sequence.request_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        session = self._sessions.pop(sequence.id)
        mine = self._by_session[session]
        del mine[sequence.request_id]
        if not mine:
            del self._by_session[session]

    def session_of(self, sequence_id: int) -> Session:
        """Who gets the answer."""
        return self._sessions[sequence_id]

    def of(self, session: Session) -> list[Sequence]:
        """A session's sequences."""
        return list(self._by_session.get(session, {}).values())

    def find(self, session: Session, request_id: int) -> Sequence | None:
        """A session's sequence by the session's own number; None once it has ended."""
        return self._by_session.get(session, {}).get(request_id)

    def fail_all(self, error: ManyloraError) -> None:
        """Answer everything with an error and forget it."""
        for session, sequences in self._by_session.items():
            for request_id in sequences:
                session.fail(request_id, error)
        self._by_session.clear()
        self._sessions.clear()

    def check(self) -> list[str]:
        """Broken invariants."""
        kept = [s for sequences in self._by_session.values() for s in sequences.values()]
        wrong = [f"ended sequence {s.id} is kept" for s in kept if s.state is State.ENDED]
        if {s.id for s in kept} != self._sessions.keys():
            wrong.append("sequences and sessions do not match")
        return wrong
