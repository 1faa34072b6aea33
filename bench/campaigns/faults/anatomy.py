"""The processes and files of a running `manylora serve`."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass
from pathlib import Path

from manylora.serve import processes
from manylora.serve.background import RunningServer

DONE_S = 300
"""Longest that anything may take."""


def descendants(pid: int) -> list[int]:
    found = processes.children(pid)
    for child in list(found):
        found += descendants(child)
    return found


def tritonserver_of(server: RunningServer) -> int:
    return tritonserver_below(server.pid)


def tritonserver_below(serve_pid: int) -> int:
    (found,) = (pid for pid in processes.children(serve_pid) if "tritonserver" in processes.command(pid)[0])
    return found


def stub_of(server: RunningServer, model: str) -> int:
    return stub_below(server.pid, model)


def stub_below(serve_pid: int, model: str) -> int:
    """The process of a front end. Not a child of it that has not become another program yet."""
    (found,) = (
        pid
        for pid in processes.children(tritonserver_below(serve_pid))
        if any(f"/{model}/1/model.py" in word for word in processes.command(pid))
    )
    return found


def engine_of(server: RunningServer, *, other_than: int = 0) -> int:
    """The engine's process; waits for it while it is being started again.

    Args:
        other_than: an earlier one, which may not have gone yet.
    """
    deadline = time.monotonic() + DONE_S
    while time.monotonic() < deadline:
        for pid in descendants(server.pid):
            if pid != other_than and "manylora.engine.process" in processes.command(pid):
                return pid
        time.sleep(0.01)
    raise AssertionError(f"no engine in {DONE_S} s")


def shared_memory_of(server: RunningServer) -> set[Path]:
    (prefix,) = (
        word.rpartition("=")[2]
        for word in processes.command(tritonserver_of(server))
        if "shm-region-prefix-name" in word
    )
    return set(Path("/dev/shm").glob(f"{prefix}*"))


@dataclass(frozen=True, slots=True)
class Remains:
    """What must be gone when a server, or one incarnation of its tritonserver, has ended."""

    pids: list[int]
    regions: set[Path]

    @classmethod
    def of(cls, server: RunningServer) -> Remains:
        return cls(descendants(server.pid), shared_memory_of(server))

    def left(self) -> list[str]:
        pids = [f"process {pid}: {processes.command(pid)}" for pid in self.pids if processes.is_alive(pid)]
        return pids + [str(region) for region in self.regions if region.exists()]


def wait_until_gone(pids: list[int]) -> None:
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            readable, _, _ = select.select([handle], [], [], DONE_S)
        finally:
            os.close(handle)
        assert readable, f"process {pid} {processes.command(pid)} is still there"
