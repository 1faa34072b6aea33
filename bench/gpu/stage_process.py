"""A process that is ended with all that it has started, so that nothing of it keeps the device."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl: whoever loses its parent becomes our child, and so is found."""
_ENDED_S = 5.0
"""How long a killed process is waited for: one that the kernel holds does not keep those that wait."""


class StageProcess:
    """A command in a session of its own.

    Args:
        command: the program and its arguments.
        env: its environment, all of it.
        folder: where it runs.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._process = subprocess.Popen(command, env=env, cwd=folder, start_new_session=True)

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None: it still runs after so long."""
        try:
            return self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it and its whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait(_ENDED_S)


def kill_orphans() -> None:
    """End what processes that have ended have left behind, also in sessions of their own: every child of this
    process, so there must be none that is to go on."""
    end_s = time.monotonic() + _ENDED_S
    while (orphans := list(_children())) and time.monotonic() < end_s:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in orphans:
            _reap(pid, end_s)


def _reap(pid: int, end_s: float) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < end_s:
            time.sleep(0.01)


def _children() -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        # Behind the name, which is in brackets and may hold anything: state, then the parent.
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(folder.name)
