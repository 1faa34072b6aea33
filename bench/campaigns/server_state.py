"""What must be true of a running server after any load: who runs, what is held, what the log says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from manylora.errors import ManyloraError
from manylora.serve import processes
from manylora.serve.background import RunningServer

from bench.campaigns.harness import wait_idle

_PARTS = {
    "manylora.cli": "manylora serve",
    "python_backend_stub": "front end",
    "bin/tritonserver": "tritonserver",
    "manylora.engine.process": "engine",
}
"""What stands in the command line of each process that must live as long as the server does."""


def main_processes(server: RunningServer) -> dict[int, str]:
    """The processes that must live as long as the server does, with their names."""
    found: dict[int, str] = {}
    waiting = [server.pid]
    for pid in waiting:
        waiting += processes.children(pid)
        words = processes.command(pid)
        for part, name in _PARTS.items():
            if any(part in word for word in words[:3]):
                model = Path(words[1]).parts[-3] if name == "front end" else ""
                found[pid] = f"{name} {model}".strip()
                break
    return found


def server_faults(server: RunningServer, before: Mapping[int, str]) -> list[str]:
    """What is wrong with the server once it is idle.

    Args:
        before: its `main_processes` at the start.
    """
    try:
        status = wait_idle(server)
    except (ManyloraError, AssertionError) as error:
        return [f"the engine does not come to rest: {error}"]
    faults = [f"check(): {error}" for error in status.check_errors]
    counters, gauges = status.counters, status.gauges
    if gauges["kv_blocks_free"] != gauges["kv_blocks_total"]:
        faults.append(f"{gauges['kv_blocks_free']} of {gauges['kv_blocks_total']} KV blocks are free")
    held = [adapter.name for adapter in status.adapters if adapter.num_running]
    if held:
        faults.append(f"adapters in use: {held}")
    if counters["accepted"] != counters["finished"] + counters["failed"] + counters["cancelled"]:
        faults.append(f"sequences are not accounted for: {counters}")
    after = main_processes(server)
    if after != dict(before):
        faults.append(f"the processes were {dict(before)} and are {after}")
    return faults + [f"in the log: {line}" for line in tracebacks(server.log)]


def tracebacks(log: Path) -> list[str]:
    """The last line of each traceback in a log."""
    found = []
    lines = iter(log.read_text(errors="replace").splitlines())
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            found.append(next((text for text in lines if text and not text.startswith(" ")), line))
    return found
