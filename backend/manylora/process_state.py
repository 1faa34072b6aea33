"""The state of another process, as the kernel reports it."""

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
    """Whether a signal such as SIGSTOP has stopped the process. A process under a debugger does not count."""
    return process_state(pid) == "T"


def is_alive(pid: int) -> bool:
    """Whether the process runs. A zombie does not, even one with threads that still hang in the kernel."""
    return process_state(pid) not in ("", "Z", "X")
