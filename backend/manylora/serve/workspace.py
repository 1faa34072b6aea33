"""The run directory as `manylora serve` uses it: made or taken over at the start, tidied at the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from manylora import paths, run_dir
from manylora.errors import InvalidArgumentError, UnavailableError
from manylora.serve import processes
from manylora.serve.repository import MODELS

RECORD = "serve.json"
"""What the server is, for `manylora status` and other programs."""
MAX_RECORD_BYTES = 1 << 16


PLAIN = re.compile(r"[A-Za-z0-9_./+@%=,-]+")
"""Paths that Triton's Python backend can be given: it writes them into a command of a shell, and its
interpreter takes the encoding of file names for ASCII."""


class Workspace:
    """Paths below one run directory, and what must lie on a plain path."""

    def __init__(self, path: Path, plain: Path) -> None:
        """
        Args:
            plain: a directory of this server's alone whose path is PLAIN; it may be the run directory.
        """
        self.path = path
        self.models = plain / "models"
        self.libraries = plain / "lib"
        self._backends = plain / "backends"
        self.log = path / "server.log"
        self.earlier_log = path / "server.log.1"
        """What was in the log before it was full."""
        self.record = path / RECORD

    def write_record(self, facts: Mapping[str, str | int]) -> None:
        fresh = self.record.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(facts, file)
        fresh.replace(self.record)

    def plain_backends(self, folder: Path) -> Path:
        """A plain path of Triton's folder of backends."""
        if PLAIN.fullmatch(str(folder)):
            return folder
        self._backends.symlink_to(folder)
        return self._backends

    def clear(self) -> None:
        """Remove what a server has made, but not its log."""
        shutil.rmtree(self.models, ignore_errors=True)
        shutil.rmtree(self.libraries, ignore_errors=True)
        self._backends.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)
        for model in MODELS:
            run_dir.clear(self.path, model)


@contextlib.contextmanager
def workspace(asked: str | None) -> Iterator[Workspace]:
    """Make the run directory, or take over the one that is named, for as long as the block runs.

    One that was made here is removed when the block ends well; after an error it is left if a log is in it.

    Raises:
        InvalidArgumentError: others can open it, or its path is too long for a socket.
        UnavailableError: another server runs in it, or it takes no file.
    """
    path = _prepared(asked)
    lock_path = path / "serve.lock"
    with _opened(lock_path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UnavailableError(
                f"--run-dir {path}: another server runs in it; choose another one"
            ) from error
        with _plain_directory(path) as plain:
            space = Workspace(path, plain)
            space.clear()
            for log in (space.log, space.earlier_log):
                log.unlink(missing_ok=True)
            has_ended_well = False
            try:
                yield space
                has_ended_well = True
            finally:
                space.clear()
                lock_path.unlink(missing_ok=True)
                if not asked and (has_ended_well or not space.log.exists()):
                    shutil.rmtree(path)


def _prepared(asked: str | None) -> Path:
    """The run directory, made where it is missing."""
    try:
        path = Path(asked).expanduser().absolute() if asked else Path(tempfile.mkdtemp(prefix=_prefix()))
    except RuntimeError as error:
        raise InvalidArgumentError(f"--run-dir {asked!r}: {error}") from error
    except OSError as error:
        raise UnavailableError(f"no temporary run directory: {error.strerror}; give --run-dir") from error
    paths.checked_text(path, "--run-dir")
    run_dir.prepare(path)
    for model in MODELS:
        run_dir.socket_path(path, model)
    return path


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("w")
    except OSError as error:
        raise UnavailableError(f"--run-dir {path.parent}: {error.strerror}") from error


@contextlib.contextmanager
def _plain_directory(path: Path) -> Iterator[Path]:
    """The run directory itself, or one of its own in a place with a plain path, removed afterwards."""
    if PLAIN.fullmatch(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(
        prefix=f"manylora-plain-{os.getuid()}-", dir=_plain_place(), ignore_cleanup_errors=True
    ) as own:
        yield Path(own)


def _plain_place() -> str:
    places = (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
    for place in places:
        if PLAIN.fullmatch(place) and os.access(place, os.W_OK | os.X_OK):
            return place
    raise UnavailableError(
        f"no place for the models with a plain path: tried {', '.join(places)}; "
        "give --run-dir with a path of ASCII letters, digits and _ . / + @ % = , - only"
    )


def find_running(warn: Callable[[str], None]) -> list[Path]:
    """The run directories in the usual place whose server is up, of this user.

    Args:
        warn: told of each one that is passed over since others may have made it, or since it cannot be read.
    """
    found = []
    # Everybody may make a directory of that name there.
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{_prefix()}*")):
        try:
            pid = _read_pid(folder)
        except FileNotFoundError:
            # Of a server that is not ready, or has stopped.
            continue
        except (OSError, ValueError, RecursionError) as error:
            warn(f"{folder}: passed over: {error}")
            continue
        # A server that was killed leaves its record.
        if processes.is_alive(pid):
            found.append(folder)
    return found


def _read_pid(folder: Path) -> int:
    """The process that a run directory's record names.

    Raises:
        FileNotFoundError: there is no record.
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
        record = json.loads(os.read(fd, MAX_RECORD_BYTES))
    pid = record.get("pid") if isinstance(record, dict) else None
    if type(pid) is not int or pid < 1:
        raise ValueError(f"{RECORD} names no process")
    return pid


def _check_own(found: os.stat_result, what: str, forbidden: int) -> None:
    if found.st_uid != os.getuid():
        raise ValueError(f"{what} belongs to user {found.st_uid}, this is user {os.getuid()}")
    if found.st_mode & forbidden:
        raise ValueError(f"{what} has mode {stat.S_IMODE(found.st_mode):04o}; others must be shut out")


def _prefix() -> str:
    return f"manylora-serve-{os.getuid()}-"
