"""The run directory of `manylora serve`: created or reused at the start, cleaned up at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from manylora import paths, run_dir
from manylora.errors import InvalidArgumentError, UnavailableError
from manylora.serve import records
from manylora.serve.repository import MODELS

PLAIN = re.compile(r"[A-Za-z0-9_./+@%=,-]+")
"""Paths that Triton's Python backend can handle: it writes them into a shell command, and its interpreter
takes ASCII for the encoding of file names."""


class Workspace:
    """The files of one server below its run directory, and those that need a plain path."""

    def __init__(self, path: Path, plain: Path, sign: Path | None) -> None:
        """
        Args:
            plain: a directory of this server's alone whose path is PLAIN; it may be the run directory.
            sign: a directory in the usual place, for those who look for a server whose run directory is
                elsewhere; None: there is none, or it is not needed.
        """
        self.path = path
        self.models = plain / "models"
        self.libraries = plain / "lib"
        self._backends = plain / "backends"
        self.log = path / "server.log"
        self.earlier_log = path / "server.log.1"
        """What was in the log before it was full."""
        self._recorded = [path] if sign is None else [path, sign]

    def write_record(self, facts: Mapping[str, str | int]) -> None:
        """Write the record of the server, for `manylora status` and other programs.

        Raises:
            OSError: a disk is full, or takes no file.
        """
        for folder in self._recorded:
            records.write(folder, facts)

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
        for folder in self._recorded:
            records.remove(folder)
        for model in MODELS:
            run_dir.clear(self.path, model)


@contextlib.contextmanager
def workspace(asked: str | None) -> Iterator[Workspace]:
    """Create the run directory, or reuse the one that is named, for as long as the block runs.

    A directory created here is removed after success; after an error it is kept if it holds a log.

    Raises:
        InvalidArgumentError: others can open it, or its path is too long for a socket.
        UnavailableError: another server runs in it, or no file can be written to it.
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
        with _plain_directory(path) as plain, _sign(asked) as sign:
            space = Workspace(path, plain, sign)
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
        path = Path(asked or tempfile.mkdtemp(prefix=records.prefix())).expanduser().absolute()
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


@contextlib.contextmanager
def _sign(asked: str | None) -> Iterator[Path | None]:
    """A directory in the default place that leads to a server whose run directory is elsewhere."""
    with contextlib.ExitStack() as opened:
        sign = None
        if asked:
            # It can be done without: --run-dir finds the server, too.
            with contextlib.suppress(OSError):
                made = tempfile.TemporaryDirectory(prefix=records.prefix(), ignore_cleanup_errors=True)
                sign = Path(opened.enter_context(made))
        yield sign


def _plain_place() -> str:
    places = (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
    for place in places:
        if PLAIN.fullmatch(place) and os.access(place, os.W_OK | os.X_OK):
            return place
    raise UnavailableError(
        f"no place for the models with a plain path: tried {', '.join(places)}; "
        "give --run-dir with a path of ASCII letters, digits and _ . / + @ % = , - only"
    )
