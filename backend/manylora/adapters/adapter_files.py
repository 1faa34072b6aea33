"""The two files of an adapter: opened through their directory's handle, and what stat reports about them.

Whatever is opened is checked after opening, so a link that is changed in between cannot lead elsewhere.
Everything here may wait for a disk or a file server for ever: call it on threads of the loader only.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from manylora.errors import InvalidArgumentError, ManyloraError, NotFoundError, UnavailableError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
NAMES = (CONFIG_NAME, WEIGHTS_NAME)
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")

FileStamp = tuple[int, ...]
"""Device, inode, size, mtime and ctime in nanoseconds; empty where there is no file."""
Stamp = tuple[FileStamp, FileStamp]
"""Of config and weights. It changes whenever either file does, except with a second change within one tick of
the file system's clock."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What one look at an adapter's directory saw."""

    directory: Path
    """Links followed."""
    stamp: Stamp
    age_s: float
    """Since the last change of either file, by the clocks of this machine and of the file system. Negative
    where they differ."""
    error: ManyloraError | None = None
    """Why it cannot be an adapter: a file is missing."""


def look_at(directory: Path) -> Sight:
    """See which files an adapter's directory holds, without reading them.

    Raises:
        NotFoundError: there is no such directory.
        UnavailableError: it cannot be inspected.
    """
    stamps: list[FileStamp] = []
    changed_ns = 0
    missing: ManyloraError | None = None
    with _directory(directory, None) as handle:
        for name in NAMES:
            try:
                found = os.stat(name, dir_fd=handle)
            except FileNotFoundError:
                stamps.append(())
                missing = missing or missing_error(handle, name)
            except OSError as error:
                _refuse_unreadable(name, error)
            else:
                stamps.append(_stamp(found))
                # Set by the file system itself: copies that keep the time of their source do not keep this.
                changed_ns = max(changed_ns, found.st_ctime_ns)
    age_s = time.time() - changed_ns / 1e9
    return Sight(directory, (stamps[0], stamps[1]), age_s, missing)


@contextlib.contextmanager
def open_files(directory: Path, root: Path | None) -> Iterator[OpenFiles]:
    """Both files of an adapter, open for reading.

    Args:
        directory: the adapter's.
        root: the files, links followed, must lie inside. None: they may lie anywhere.

    Raises:
        NotFoundError: a file is missing.
        InvalidArgumentError: one is no regular file, or lies outside the root.
        UnavailableError: one cannot be opened.
    """
    with _directory(directory, root) as handle, contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(handle, name, root)) for name in NAMES]
        yield OpenFiles(handle, files[0], files[1])


class OpenFiles:
    """An adapter's files while they are read."""

    def __init__(self, handle: int, config: io.FileIO, weights: io.FileIO) -> None:
        self.config = config
        self.weights = weights
        self._handle = handle
        self._opened = [_stamp(os.fstat(file.fileno())) for file in (config, weights)]

    def refuse_changed(self) -> None:
        """Refuse files that changed while they were read: they may be parts of two adapters.

        Raises:
            UnavailableError: one is not what it was when it was opened.
        """
        for name, file, opened in zip(NAMES, (self.config, self.weights), self._opened, strict=True):
            try:
                now = os.stat(name, dir_fd=self._handle)
            except OSError as error:
                raise UnavailableError(f"{name} was taken away while the adapter was read") from error
            if not opened == _stamp(os.fstat(file.fileno())) == _stamp(now):
                raise UnavailableError(f"{name} changed while the adapter was read")


def missing_error(handle: int, name: str) -> NotFoundError | InvalidArgumentError:
    """The error for a missing file. It names what was found in its place."""
    if name == WEIGHTS_NAME:
        pickles = [pickle for pickle in PICKLE_NAMES if _exists(handle, pickle)]
        if pickles:
            return InvalidArgumentError(
                f"found {', '.join(pickles)} but no {WEIGHTS_NAME}: only safetensors is read, never pickle"
            )
    return NotFoundError(f"{name} is missing")


@contextlib.contextmanager
def _directory(directory: Path, root: Path | None) -> Iterator[int]:
    try:
        handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError("its directory is not found") from error
    except OSError as error:
        _refuse_unreadable("its directory", error)
    try:
        _refuse_outside(handle, "its directory", root)
        yield handle
    finally:
        os.close(handle)


def _open(handle: int, name: str, root: Path | None) -> io.FileIO:
    # First without opening what is there: a device could act on that, a pipe would wait.
    try:
        path = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=handle)
    except FileNotFoundError as error:
        raise missing_error(handle, name) from error
    except OSError as error:
        _refuse_unreadable(name, error)
    try:
        _refuse_outside(path, name, root)
        if not stat.S_ISREG(os.fstat(path).st_mode):
            raise InvalidArgumentError(f"{name} is no regular file")
        return io.FileIO(os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        _refuse_unreadable(name, error)
    finally:
        os.close(path)


def _refuse_outside(handle: int, what: str, root: Path | None) -> None:
    """Refuse what was opened outside the root, whatever its name leads to by now."""
    if root is not None and not Path(os.readlink(f"/proc/self/fd/{handle}")).is_relative_to(root):
        raise InvalidArgumentError(f"{what} is a link that leaves adapter_root")


def _refuse_unreadable(what: str, error: OSError) -> NoReturn:
    raise UnavailableError(f"{what} cannot be read: {error.strerror}") from error


def _exists(handle: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=handle)
    except OSError:
        return False
    return True


def _stamp(found: os.stat_result) -> FileStamp:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
