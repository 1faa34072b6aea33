"""A front end's report on itself: one line of JSON to everyone who connects to its socket in the run
directory.

This is no request, so neither Triton nor the engine counts it. An answer shows that the process lives and its
interpreter runs; the turns of its loops show that they serve.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from manylora import paths
from manylora.errors import UnavailableError

log = logging.getLogger(__name__)


class Stage:
    """One loop that serves requests. Its thread enters the context for each turn that has work."""

    def __init__(self) -> None:
        self.num_turns = 0
        """Begun so far."""
        self.is_busy = False

    def __enter__(self) -> None:
        self.num_turns += 1
        self.is_busy = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_busy = False


@dataclass(frozen=True, slots=True)
class StageState:
    """A stage at one moment."""

    num_turns: int
    is_busy: bool


class HealthSocket:
    """Answers on a Unix socket from its own thread until it is closed."""

    def __init__(self, path: Path, stages: Mapping[str, Stage]) -> None:
        """Begin to answer.

        Raises:
            UnavailableError: the socket cannot be made.
        """
        self._path = path
        self._stages = stages
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            path.unlink(missing_ok=True)
            self._listener.bind(str(path))
        except OSError as error:
            self._listener.close()
            raise UnavailableError(
                f"socket {paths.to_text(path)}: cannot be made: {error.strerror}"
            ) from error
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, name="manylora-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and remove the socket."""
        self._path.unlink(missing_ok=True)
        # Wakes the thread from its wait.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            # One line fits into a socket's buffer; a peer that has hung up is no error.
            with connection, contextlib.suppress(OSError):
                connection.sendall(self._line())

    def _line(self) -> bytes:
        state = {name: [stage.num_turns, stage.is_busy] for name, stage in self._stages.items()}
        return json.dumps(state).encode() + b"\n"


def read_stages(line: str) -> dict[str, StageState]:
    """Parse a front end's report.

    Raises:
        ValueError: it is not such a report.
    """
    try:
        return {name: StageState(*state) for name, state in json.loads(line).items()}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"not a front end's answer: {line!r}") from error
