"""Processes that do jobs side by side and are killed when time is up: compilers and drivers can hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

JobT = TypeVar("JobT")

KILLED_S = 5.0
"""How long a killed process is waited for: one that the kernel holds does not keep those that wait."""


class Workers(Generic[JobT]):
    """Processes of their own, from nothing, each of which does one job after the other.

    Args:
        do: what is done of each job; imported by each process, so of a module's top level.
        count: 0: none, and no job is done.
    """

    def __init__(self, do: Callable[[JobT], object], count: int) -> None:
        context = get_context("spawn")
        self._workers = {}
        for _ in range(count):
            mine, its = context.Pipe()
            # No daemon: those may have no children, and compilers do.
            process = context.Process(target=_serve, args=(do, its), daemon=False)
            process.start()
            its.close()
            self._workers[mine] = process

    def run(self, jobs: Sequence[JobT], limit_s: float) -> int:
        """Do the jobs until the time is up; a process that is at one then is killed.

        Returns:
            How many gave something true. The others failed, ended their process, or were not done.
        """
        end_s, waiting, busy, done = time.monotonic() + limit_s, list(reversed(jobs)), set[Any](), 0
        for mine in list(self._workers):
            self._give(mine, waiting, busy)
        while busy and (left_s := end_s - time.monotonic()) > 0:
            for mine in wait(list(busy), left_s):
                busy.discard(mine)
                try:
                    done += bool(mine.recv())  # type: ignore[union-attr]  # a connection
                except (EOFError, OSError):
                    self._kill([mine])
                else:
                    self._give(mine, waiting, busy)
        self._kill(list(busy))
        return done

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._kill(list(self._workers))

    def _give(self, mine: Any, waiting: list[JobT], busy: set[Any]) -> None:
        if not waiting:
            return
        try:
            mine.send(waiting.pop())
        except OSError:
            self._kill([mine])
        else:
            busy.add(mine)

    def _kill(self, connections: Sequence[Any]) -> None:
        processes = [self._workers.pop(mine) for mine in connections]
        for process in processes:
            process.kill()
        for mine, process in zip(connections, processes, strict=True):
            process.join(KILLED_S)
            mine.close()


def _serve(do: Callable[[JobT], object], its: Connection) -> None:
    """Do what comes until nothing more can."""
    while True:
        try:
            job = its.recv()
        except EOFError:
            return
        its.send(bool(do(job)))
