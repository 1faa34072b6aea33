"""The run directory as `manylora serve` uses it: made or taken over at the start, tidied at the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from manylora import run_dir
from manylora.errors import UnavailableError
from manylora.serve import processes
from manylora.serve.repository import MODELS

RECORD = "serve.json"
"""What the server is, for `manylora status` and other programs."""


class Workspace:
    """Paths below one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models = path / "models"
        self.libraries = path / "lib"
        self.log = path / "server.log"
        self.record = path / RECORD

    def write_record(self, facts: Mapping[str, str | int]) -> None:
        fresh = self.record.with_suffix(".new")
        fresh.write_text(json.dumps(facts))
        fresh.replace(self.record)

    def clear(self) -> None:
        """Remove what a server has made, but not its log."""
        shutil.rmtree(self.models, ignore_errors=True)
        shutil.rmtree(self.libraries, ignore_errors=True)
        self.record.unlink(missing_ok=True)
        for model in MODELS:
            run_dir.clear(self.path, model)


@contextlib.contextmanager
def workspace(asked: str | None) -> Iterator[Workspace]:
    """Make the run directory, or take over the one that is named, for as long as the block runs.

    One that was made here is removed when the block ends well; after an error it is left, with the log in it.

    Raises:
        InvalidArgumentError: others can open it, or its path is too long for a socket.
        UnavailableError: another server runs in it.
    """
    path = Path(asked).expanduser().absolute() if asked else Path(tempfile.mkdtemp(prefix=_prefix()))
    run_dir.prepare(path)
    for model in MODELS:
        run_dir.socket_path(path, model)
    lock_path = path / "serve.lock"
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UnavailableError(
                f"--run-dir {path}: another server runs in it; choose another one"
            ) from error
        space = Workspace(path)
        space.clear()
        space.log.unlink(missing_ok=True)
        try:
            yield space
        finally:
            space.clear()
            lock_path.unlink(missing_ok=True)
        if not asked:
            shutil.rmtree(path)


def find_running() -> list[Path]:
    """The run directories in the usual place whose server is up, of this user."""
    records = Path(tempfile.gettempdir()).glob(f"{Path(_prefix()).name}*/{RECORD}")
    # A server that was killed leaves its record.
    return sorted(path.parent for path in records if processes.is_alive(json.loads(path.read_text())["pid"]))


def _prefix() -> str:
    return f"manylora-serve-{os.getuid()}-"
