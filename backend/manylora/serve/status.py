"""`manylora status`: prints the engine's state, which it asks for over the engine's socket."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from manylora import run_dir as run_directory
from manylora.errors import InvalidArgumentError, NotFoundError
from manylora.ipc import query_status
from manylora.messages import Status
from manylora.serve.records import find_running
from manylora.serve.repository import ENGINE_MODEL


def print_status(run_dir: Path | None, *, as_json: bool = False) -> int:
    """Print the state of one engine.

    Args:
        run_dir: the server's; None for the only one that this user runs.

    Returns: the exit status: 1 where the engine's own check has found something wrong.
    """
    status = query_status(run_directory.socket_path(run_dir or _only_one(), ENGINE_MODEL))
    print(json.dumps(msgspec.to_builtins(status)) if as_json else describe(status))
    return 1 if status.check_errors else 0


def _only_one() -> Path:
    found = find_running(lambda text: print(f"manylora status: {text}", file=sys.stderr))
    if not found:
        raise NotFoundError("no server of yours runs in the usual place; name its directory with --run-dir")
    if len(found) > 1:
        raise InvalidArgumentError(
            f"several servers run; name one with --run-dir: {', '.join(map(str, found))}"
        )
    return found[0]


def describe(status: Status) -> str:
    """The state as a table for people."""
    gauges, counters = status.gauges, status.counters
    lines = [
        f"sequences   {gauges.get('running', 0)} running, {gauges.get('waiting', 0)} waiting; "
        f"{counters.get('steps', 0)} steps, {counters.get('prompt_tokens', 0)} prompt and "
        f"{counters.get('generated_tokens', 0)} generated tokens",
        f"KV cache    {gauges.get('kv_blocks_free', 0)} of {gauges.get('kv_blocks_total', 0)} blocks free",
        f"host cache  {gauges.get('host_adapters', 0)} adapters; "
        f"{counters.get('host_loads', 0)} loads, {counters.get('host_evictions', 0)} evictions",
        f"device pool {gauges.get('device_adapters', 0)} adapters, {gauges.get('pool_pages_free', 0)} of "
        f"{gauges.get('pool_pages_total', 0)} pages free, {gauges.get('pool_bytes', 0) / 1e6:.1f} MB; "
        f"{counters.get('device_copies', 0)} copies, {counters.get('device_evictions', 0)} evictions",
    ]
    if status.adapters:
        lines.append(f"{'adapter':<32} {'state':<8} {'rank':>4} {'MB':>7} {'running':>7}  version")
        lines += [
            f"{a.name:<32} {a.state:<8} {a.rank:>4} {a.num_bytes / 1e6:>7.1f} {a.num_running:>7}  "
            f"{a.version[:12]}{' pinned' if a.pinned else ''}{' outdated' if a.outdated else ''}"
            f"{f' CHANGED FILES NOT SERVED: {a.files_error}' if a.files_error else ''}"
            for a in status.adapters
        ]
    return "\n".join([*lines, *(f"BROKEN: {error}" for error in status.check_errors)])
