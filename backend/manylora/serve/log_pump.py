"""Writes what comes on standard input into a log of bounded length: `python log_pump.py FILE MAX_BYTES`.

A program of its own that needs no packages. It keeps reading even while the disk is full or hangs; what
cannot be written is lost. It ends when the last writer has closed the pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

READ_BYTES = 1 << 16
MAX_QUEUED_BYTES = 8 << 20
"""Bytes that may wait for a slow disk."""
LAST_WRITE_S = 5.0
"""Time to write what is left at the end."""


class LogPump:
    """A queue between a pipe and a file. When the file is full it is kept as FILE.1, and a new one begins."""

    def __init__(self, path: str, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        # Guards the three below: one thread reads, the other writes.
        self._changed = threading.Condition()
        self._queue: list[bytes] = []
        self._num_lost = 0
        self._is_over = False

    def run(self) -> None:
        """Read to the end."""
        # A thread, since a write to a disk that hangs never returns; it must not keep this process either.
        writer = threading.Thread(target=self._write, daemon=True)
        writer.start()
        while chunk := os.read(0, READ_BYTES):
            with self._changed:
                if sum(map(len, self._queue)) > MAX_QUEUED_BYTES:
                    self._num_lost += len(chunk)
                else:
                    self._queue.append(chunk)
                self._changed.notify()
        with self._changed:
            self._is_over = True
            self._changed.notify()
        writer.join(LAST_WRITE_S)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_over)
                chunks, self._queue = self._queue, []
                num_lost, self._num_lost = self._num_lost, 0
                if not chunks:
                    return
            if num_lost:
                chunks.append(f"\n[{num_lost} bytes of the log are lost: too many at once]\n".encode())
            for chunk in chunks:
                # A full disk costs log lines and nothing else.
                with contextlib.suppress(OSError):
                    self._append(chunk)

    def _append(self, chunk: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        try:
            if os.fstat(fd).st_size + len(chunk) > self._max_bytes:
                os.replace(self._path, f"{self._path}.1")
                os.close(fd)
                fd = -1
                fd = os.open(self._path, flags, 0o600)
            while chunk:
                chunk = chunk[os.write(fd, chunk) :]
        finally:
            if fd >= 0:
                os.close(fd)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    LogPump(sys.argv[1], int(sys.argv[2])).run()
    # A thread that hangs in the kernel would block a regular exit.
    os._exit(0)


if __name__ == "__main__":
    main()
