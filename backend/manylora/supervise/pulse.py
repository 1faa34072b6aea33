"""The pulse of the engine process: lines on its standard output, by which its owner knows that it runs.

An empty line comes each second from a thread that does nothing else, beginning with the first moment of the
start; the answer to the owner's order comes in between as one line of JSON.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

from manylora.process_state import is_alive, is_stopped

BEAT_S = 1.0

MAX_STOPPED_TURNS = 3
"""Silent seconds of a process that a signal has stopped. Nothing but another signal lets it go on."""
MAX_SILENT_TURNS = 60
"""Silent seconds of one that serves. A beat needs a moment of the processor and of the interpreter's lock,
which a step gives away all the time; even a machine that is many times overloaded grants that in a minute."""
MAX_SILENT_TURNS_AT_START = 600
"""Silent seconds of one that starts: reading a large tensor from a slow disk holds the interpreter's lock."""


class Pulse:
    """The engine's side."""

    def __init__(self, fd: int) -> None:
        """Begin to beat on a pipe, until its reader has gone."""
        self._fd = fd
        # Guards the pipe: an answer may be longer than what is written in one piece.
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="manylora-pulse", daemon=True).start()

    def answer(self, line: str) -> None:
        """Write a line that is not empty. A reader that has gone is no error."""
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

    It counts its own turns of about a second and compares no times: when the whole machine, or the owner too,
    was paused, the pause is one turn and no silence of the engine.
    """

    def __init__(self, fd: int, pid: int) -> None:
        self._fd = fd
        self._pid = pid
        self._buffer = b""
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def next_line(self, max_silent_turns: int) -> bytes | None:
        """Wait for a line.

        Returns: the line, empty for a beat; None when the process has closed the pipe, as its end does.

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
