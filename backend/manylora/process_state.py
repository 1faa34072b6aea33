"""What the kernel says of another process."""

from __future__ import annotations

from pathlib import Path


def process_state(pid: int) -> str:
    """The letter of proc(5): `R` and `S` run and sleep, `T` is stopped by a signal, `Z` has ended.

    Returns: the letter; empty where there is no such process.
    """
    try:
        # The name in parentheses may hold blanks and parentheses itself.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_stopped(pid: int) -> bool:
    """Say whether a signal (SIGSTOP and its like) holds the process. One under a debugger is not meant."""
    return process_state(pid) == "T"


def is_alive(pid: int) -> bool:
    """Say whether the process runs. A zombie does not, nor one whose last threads hang in the kernel."""
    return process_state(pid) not in ("", "Z", "X")
