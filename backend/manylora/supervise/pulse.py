"""The pulse of the engine process: lines on its standard output that show its owner that it runs.

A thread that does nothing else writes an empty line each second from the very beginning; the answer to the
owner's order comes in between, as one line of JSON.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

from manylora.process_state import is_alive, is_stopped

BEAT_S = 1.0

MAX_STOPPED_TURNS = 3
"""Silent seconds of a process that a signal has stopped: only another signal would resume it."""
MAX_SILENT_TURNS = 60
"""Silent seconds of a process that serves. A beat needs a moment of the processor and of the interpreter's
lock, which steps release all the time; even a heavily overloaded machine grants that within a minute."""
MAX_SILENT_TURNS_AT_START = 600
"""Silent seconds of a process that starts: reading a large tensor from a slow disk holds the lock."""


class Pulse:
    """The engine's side."""

    def __init__(self, fd: int) -> None:
        """Beat on a pipe until its reader has closed it."""
        self._fd = fd
        # Guards the pipe: an answer may be longer than what is written in one piece.
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="manylora-pulse", daemon=True).start()

    def answer(self, line: str) -> None:
        """Write a line that is not empty. A reader that has closed the pipe is no error."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            left = line.encode() + b"\n"
            while left:
                left = left[os.write(self._fd, left) :]

    def _beat(self) -> None:
        pause = threading.Event()
        with contextlib.suppress(BrokenPipeError):
            while not pause.wait(BEAT_S):
                with self._lock:
                    os.write(self._fd, b"\n")


class Silence(Exception):
    """The process has said nothing for too long."""


class PulseListener:
    """The owner's side. Used by one thread at a time.

    It counts its own turns of about a second instead of comparing times: if the whole machine or the owner
    was paused, that is one turn and no silence of the engine.
    """

    def __init__(self, fd: int, pid: int) -> None:
        self._fd = fd
        self._pid = pid
        self._buffer = b""
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def next_line(self, max_silent_turns: int) -> bytes | None:
        """Wait for a line.

        Returns: the line, empty for a beat; None when the pipe is closed, as at the end of the process.

        Raises:
            Silence: nothing came for `max_silent_turns`, or MAX_STOPPED_TURNS of a process that is stopped.
        """
        num_silent = 0
        while b"\n" not in self._buffer:
            if self._poll.poll(round(BEAT_S * 1000)):
                part = os.read(self._fd, 4096)
                if not part:
                    return None
                self._buffer += part
                num_silent = 0
                continue
            num_silent += 1
            if num_silent >= MAX_STOPPED_TURNS and not is_alive(self._pid):
                # A thread that hangs in the kernel keeps the pipe open.
                return None
            if num_silent >= MAX_STOPPED_TURNS and is_stopped(self._pid):
                raise Silence("a signal has stopped it")
            if num_silent >= max_silent_turns:
                raise Silence(f"it has given no sign of life for {num_silent} s")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
