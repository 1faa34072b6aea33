"""The run directory: it holds the engine's socket and, if `llm` failed to start, the reason."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from pathlib import Path

from manylora import errors, paths
from manylora.errors import InvalidArgumentError, ManyloraError, UnavailableError
from manylora.process_state import is_alive

MAX_SOCKET_PATH_BYTES = 107
"""sun_path of a Unix socket is 108 bytes with its end mark."""


def default_path(server_pid: int) -> Path:
    """Where the front ends of one tritonserver meet when no `run_dir` is configured.

    Args:
        server_pid: tritonserver's, which is the parent of every front end.
    """
    return Path("/tmp") / f"manylora-{os.getuid()}-{server_pid}"


def find_default() -> list[Path]:
    """Default run directories of this user's front ends whose tritonserver is alive."""
    found = []
    for path in sorted(Path("/tmp").glob(f"manylora-{os.getuid()}-*")):
        pid = path.name.rpartition("-")[2]
        # It may go while it is looked at.
        with contextlib.suppress(OSError):
            if pid.isdecimal() and is_alive(int(pid)) and path.lstat().st_uid == os.getuid():
                found.append(path)
    return found


def prepare(path: Path) -> Path:
    """Create the directory if it is missing, and check that nobody else can open it.

    Raises:
        InvalidArgumentError: it cannot be made, is no directory, is another user's or open to others.
    """
    asked = f"run_dir={paths.to_text(path)!r}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise InvalidArgumentError(f"{asked}: cannot be used: {error.strerror or error}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise InvalidArgumentError(f"{asked}: is a link; give the directory itself")
    if found.st_uid != os.getuid():
        raise InvalidArgumentError(
            f"{asked}: belongs to user {found.st_uid}; it must be user {os.getuid()}'s own"
        )
    if found.st_mode & 0o077:
        raise InvalidArgumentError(
            f"{asked}: has mode {stat.S_IMODE(found.st_mode):04o}; others must be shut out (chmod 700)"
        )
    return path


def socket_path(run_dir: Path, model: str) -> Path:
    """The socket of the engine that the Triton model `model` starts.

    Raises:
        InvalidArgumentError: the path is longer than a Unix socket's may be.
    """
    return _checked(run_dir, f"{model}.sock")


def health_path(run_dir: Path, model: str) -> Path:
    """The socket on which the front end of `model` reports (`supervise/health.py`).

    Raises:
        InvalidArgumentError: the path is longer than a Unix socket's may be.
    """
    return _checked(run_dir, f"{model}.live")


def _checked(run_dir: Path, name: str) -> Path:
    path = run_dir.absolute() / name
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise InvalidArgumentError(
            f"run_dir={paths.to_text(run_dir)!r}: the socket's path {paths.to_text(path)} has {length} "
            f"bytes; allowed are {MAX_SOCKET_PATH_BYTES}, so choose a shorter directory"
        )
    return path


def lock(path: Path) -> int:
    """Make sure that one engine at a time serves a socket.

    Args:
        path: the socket's.

    Returns: a file descriptor that holds the lock until it is closed or this process ends.

    Raises:
        UnavailableError: another process serves it.
    """
    lock_path = path.with_suffix(".lock")
    for _ in range(2):
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(fd, 32, 0)
            os.close(fd)
            if not holder.isdigit() or is_alive(int(holder)):
                break
            # Its process has ended except for threads that hang in the kernel and keep the lock.
            lock_path.unlink(missing_ok=True)
        else:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
            return fd
    raise UnavailableError(
        f"socket {paths.to_text(path)}: another engine serves it; stop that one or use another run_dir"
    )


def clear(run_dir: Path, model: str) -> None:
    """Remove what an engine or a failed start has left: socket, locks and failure note.

    Does nothing while an engine serves there.
    """
    try:
        held = lock(run_dir / f"{model}.sock")
    except (UnavailableError, FileNotFoundError):
        return
    for suffix in ("sock", "failed", "owner", "live", "lock"):
        (run_dir / f"{model}.{suffix}").unlink(missing_ok=True)
    os.close(held)


def remove(run_dir: Path) -> None:
    """Remove the directory if it is empty."""
    # Another front end may have removed it, or something may lie in it.
    with contextlib.suppress(OSError):
        run_dir.rmdir()


def claim(run_dir: Path, model: str) -> int:
    """Claim the engine of `model` for this process, for as long as it lives.

    Returns: a file descriptor that holds the claim.

    Raises:
        UnavailableError: another process keeps it.
    """
    fd = os.open(run_dir / f"{model}.owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise UnavailableError(
            f"run_dir {paths.to_text(run_dir)}: another server's {model} uses it"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getppid()).encode(), 0)
    return fd


def owner_has_died(run_dir: Path, model: str) -> bool:
    """Whether the `llm` of this same tritonserver has begun to start its engine and has died since."""
    try:
        fd = os.open(run_dir / f"{model}.owner", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # One of an earlier tritonserver says nothing about this one's, which may be still to come.
        if os.pread(fd, 32, 0) != str(os.getppid()).encode():
            return False
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def write_failure(run_dir: Path, model: str, error: ManyloraError) -> None:
    """Tell those who wait for the engine of `model` that it failed to start."""
    note = {"server_pid": os.getppid(), "code": error.code, "message": error.message}
    path = run_dir / f"{model}.failed"
    partial = path.with_suffix(".failed.tmp")
    partial.write_text(json.dumps(note))
    partial.replace(path)


def read_failure(run_dir: Path, model: str) -> ManyloraError | None:
    """The failure that the `llm` of this same tritonserver has written, if any."""
    try:
        note = json.loads((run_dir / f"{model}.failed").read_text())
    except FileNotFoundError:
        return None
    # A note of an earlier tritonserver in the same directory says nothing about this one.
    if note["server_pid"] != os.getppid():
        return None
    return errors.from_code(note["code"], note["message"])
