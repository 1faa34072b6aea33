"""The record of a running server, a file in its run directory, and how this user's servers are found."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from manylora import paths
from manylora.serve import processes

RECORD = "serve.json"
MAX_RECORD_BYTES = 1 << 16


def prefix() -> str:
    """The prefix of run directories in the default place, the directory of temporary files."""
    return f"manylora-serve-{os.getuid()}-"


def write(folder: Path, facts: Mapping[str, str | int]) -> None:
    """Put a record into a directory, whole or not at all.

    Raises:
        OSError: its disk is full, or takes no file.
    """
    fresh = folder / f"{RECORD}.new"
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(facts, file)
    fresh.replace(folder / RECORD)


def remove(folder: Path) -> None:
    """Take the record out of a directory."""
    for name in (RECORD, f"{RECORD}.new"):
        (folder / name).unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any]:
    """The record in a run directory.

    Raises:
        FileNotFoundError: there is none.
        OSError, ValueError: directory or record may be another user's work, or it is no record of ours.
    """
    with contextlib.ExitStack() as opened:
        # Each is looked at as it was opened, so that nothing can take its place in between. O_NONBLOCK: a
        # pipe of that name would hold us up.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        at = os.open(folder, flags | os.O_DIRECTORY)
        opened.callback(os.close, at)
        _check_own(os.fstat(at), "the directory", stat.S_IRWXG | stat.S_IRWXO)
        fd = os.open(RECORD, flags, dir_fd=at)
        opened.callback(os.close, fd)
        found = os.fstat(fd)
        _check_own(found, RECORD, stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{RECORD} is no file")
        try:
            record = json.loads(os.read(fd, MAX_RECORD_BYTES))
        except RecursionError as error:
            raise ValueError(f"{RECORD} is no record") from error
    pid = record.get("pid") if isinstance(record, dict) else None
    if type(pid) is not int or pid < 1:
        raise ValueError(f"{RECORD} names no process")
    for key in ("http", "run_dir"):
        if not isinstance(record.get(key, ""), str):
            raise ValueError(f"{RECORD} has no text as {key}")
    return dict(record)


def find_running(warn: Callable[[str], None]) -> list[Path]:
    """The run directories of this user's servers that run and have a record in the default place.

    Args:
        warn: called for each one that is skipped because others may have made it or it cannot be read.
    """
    found = []
    # Everybody may make a directory of that name there.
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{prefix()}*")):
        try:
            record = read(folder)
        except FileNotFoundError:
            # Its server is not ready yet, or has stopped.
            continue
        except (OSError, ValueError) as error:
            warn(f"{folder}: passed over: {error}")
            continue
        # A server that was killed leaves its record.
        if processes.is_alive(record["pid"]):
            run_dir = record.get("run_dir")
            found.append(paths.from_text(run_dir) if run_dir else folder)
    return found


def _check_own(found: os.stat_result, what: str, forbidden: int) -> None:
    if found.st_uid != os.getuid():
        raise ValueError(f"{what} belongs to user {found.st_uid}, this is user {os.getuid()}")
    if found.st_mode & forbidden:
        raise ValueError(f"{what} has mode {stat.S_IMODE(found.st_mode):04o}; others must be shut out")
