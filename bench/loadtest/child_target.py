"""A target in a process of its own.

GNU OpenMP lets no thread wait actively while a process has more OpenMP threads than processors, and every
Python thread that has run torch's operators keeps some. Two targets in one process, or one beside the
benchmark's own tensors, would each be slower than alone.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from bench.loadtest.driver import Progress, TargetError
from bench.loadtest.record import Round
from bench.loadtest.target import Reference, TokenIds
from bench.loadtest.workload import Case

END_S = 30.0
"""In which the process ends by itself once it is told to."""


class ChildTarget:
    """Has another process do what is asked of the target.

    The records' times are comparable across processes: on Linux `time.perf_counter` reads CLOCK_MONOTONIC,
    which is one clock for all.
    """

    def __init__(self, name: str, make: Callable[[], Reference]) -> None:
        """Start the process and have it make the target.

        Args:
            make: is pickled, and called there.

        Raises:
            TargetError: the target cannot be made.
        """
        self.name = name
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.loadtest.child"],
                stdin=theirs.fileno(),
                # It finds what this process finds.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                # Ctrl-C is for this process, which then ends the other one.
                start_new_session=True,
            )
        self._is_idle = True
        try:
            self._call(make)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ChildTarget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, case: Case, progress: Progress) -> Round:
        """See Target.

        Raises:
            TargetError: the target failed, or its process ended.
        """
        answer: Round = self._call(("run", (case,)), progress)
        return answer

    def gap(self, prompt: TokenIds, adapter: str) -> float:
        """See Reference."""
        lead: float = self._call(("gap", (prompt, adapter)))
        return lead

    def close(self) -> None:
        """End the process: in peace if it waits, else at once."""
        if self._is_idle and self._process.poll() is None:
            self._connection.send(None)
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        else:
            self._process.kill()
        self._connection.close()
        self._process.wait()

    def _call(self, message: object, progress: Progress = lambda: None) -> Any:
        self._is_idle = False
        try:
            self._connection.send_bytes(pickle.dumps(message))
            while (answer := self._connection.recv())[0] == "progress":
                progress()
        except (EOFError, ConnectionError) as error:
            raise TargetError(f"{self.name}: its process ended with status {self._process.wait()}") from error
        kind, value = answer
        if kind == "error":
            raise TargetError(f"{self.name}: {value}")
        self._is_idle = True
        return value
