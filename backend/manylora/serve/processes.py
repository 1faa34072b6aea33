"""The process tree below this one: its members, and how all of them are ended even if a parent has died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

from manylora.process_state import is_alive

__all__ = ["adopt_orphans", "children", "command", "end_children", "end_with_parent", "is_alive"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Make every descendant whose parent dies a child of this process, so that none escapes."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_with_parent() -> None:
    """Have SIGTERM sent to this process when the parent's thread that started it ends, however it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def children(pid: int) -> list[int]:
    """The living processes whose parent is `pid`; a zombie is not living."""
    return [child for child, state in _children(pid) if state not in "ZX"]


def dead_children(pid: int) -> list[int]:
    """The zombies among the children of `pid`: ended and not waited for."""
    return [child for child, state in _children(pid) if state == "Z"]


def _children(pid: int) -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # A process may end while it is looked at.
            with contextlib.suppress(OSError):
                # The name in parentheses may hold blanks and parentheses itself.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == pid:
                    found.append((int(entry.name), state))
    return found


def command(pid: int) -> list[str]:
    """The command line of a process, empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    except OSError:
        return []


def end_children(grace_s: float, killed_grace_s: float = 5.0) -> list[int]:
    """Wait for all children to end, then kill those that have not; grandchildren become children in between.

    Only for a process that has adopted orphans and owns all its children.

    Args:
        killed_grace_s: seconds to end once they are killed. A process that waits in the kernel, as for a disk
            that does not answer, may never end.

    Returns:
        Those that are left.
    """
    deadline = time.monotonic() + grace_s
    while (alive := children(os.getpid())) and time.monotonic() < deadline + killed_grace_s:
        if time.monotonic() > deadline:
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.02)
    _reap()
    return alive


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
