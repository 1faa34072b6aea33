"""The log of one tritonserver and all below it: a pipe, and a process that writes it to a file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from pathlib import Path

from manylora.process_state import is_stopped
from manylora.serve import log_pump

MAX_BYTES = 32 << 20
"""Of the file; one earlier file of the same size is kept."""
PIPE_BYTES = 1 << 20
"""Capacity of the pipe. A noisy server fills the default of 64 KB in a moment."""
MAX_STOPPED_LOOKS = 4
"""Looks in a row at a stopped pump; with a full pipe, its writers would stop too."""
TAIL_WAIT_S = 1.0
"""Time for the last lines of a server that has ended to reach the file."""
MAX_TAIL_BYTES = 4 << 20


class ServerLog:
    """Accepts everything written to `write_end`, whatever happens to the disk or the pump."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._start = _identity(path)
        # Held here too: without a reader, the end of a pump would kill the writers.
        self._read_end, self.write_end = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._read_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._num_stopped_looks = 0
        self._pump = self._start_pump()

    def close_write_end(self) -> None:
        """Call it once the server has its copy. The log ends when its last writer has gone."""
        os.close(self.write_end)

    def look(self) -> None:
        """Replace a pump that has ended or been stopped; to be called regularly."""
        if self._read_end < 0:
            return
        self._num_stopped_looks = self._num_stopped_looks + 1 if is_stopped(self._pump.pid) else 0
        if self._num_stopped_looks >= MAX_STOPPED_LOOKS:
            self._pump.kill()
            self._pump.wait()
        if self._pump.poll() is not None:
            self._num_stopped_looks = 0
            self._pump = self._start_pump()

    def close(self) -> None:
        """Close the log; the pump ends by itself."""
        if self._read_end >= 0:
            os.close(self._read_end)
            self._read_end = -1

    def tail(self) -> str:
        """What this server has written, or the end of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._pump.wait(TAIL_WAIT_S)
        # The file may have been full since; the one before it may have begun as an earlier server's.
        files = [self._path]
        if _identity(self._path)[0] != self._start[0]:
            files.insert(0, self._path.with_name(f"{self._path.name}.1"))
        parts = [_read(file, self._start[1] if _identity(file)[0] == self._start[0] else 0) for file in files]
        return b"".join(parts)[-MAX_TAIL_BYTES:].decode(errors="replace")

    def _start_pump(self) -> subprocess.Popen[bytes]:
        # Isolated: it needs neither packages nor the environment. Its own session, so that Ctrl-C spares it.
        return subprocess.Popen(
            [sys.executable, "-I", "-S", log_pump.__file__, str(self._path), str(self._max_bytes)],
            stdin=self._read_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def _identity(path: Path) -> tuple[int, int]:
    """The number and the length of a file; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_size


def _read(path: Path, start: int) -> bytes:
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(start, length - MAX_TAIL_BYTES))
            return file.read()
    except OSError:
        return b""
