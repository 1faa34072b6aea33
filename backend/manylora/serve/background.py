"""`manylora serve` as a child process of another program: demo, tests, benchmarks."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from manylora import paths
from manylora.errors import UnavailableError

STOP_S = 90.0
"""More than `manylora serve` takes in the worst case before it kills what is left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningServer:
    """The facts of the `ready` line."""

    http: str
    """host:port"""
    grpc: str
    metrics: str
    run_dir: Path
    pid: int
    """Of `manylora serve`."""

    @property
    def log(self) -> Path:
        return self.run_dir / "server.log"


@contextlib.contextmanager
def running_server(
    *, base_model: Path, adapter_root: Path, arguments: Sequence[str] = (), stderr: IO[str] | None = None
) -> Iterator[RunningServer]:
    """Run a server on free ports for as long as the block runs. It ends with the calling thread too.

    Args:
        arguments: further words of the command line.
        stderr: where the command's messages go; None is this program's own.

    Raises:
        UnavailableError: it ended before it was ready.
    """
    command = [sys.executable, "-m", "manylora.cli", "serve"]
    command += [f"--base-model={base_model}", f"--adapter-root={adapter_root}"]
    command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0", "--stop-with-parent", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield _read_ready(process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            assert process.stdout
            process.stdout.close()


def _read_ready(process: subprocess.Popen[str]) -> RunningServer:
    assert process.stdout
    for line in process.stdout:
        word, _, facts = line.partition(" ")
        if word == "ready":
            read = json.loads(facts)
            return RunningServer(**{**read, "run_dir": paths.from_text(read["run_dir"])})
    raise UnavailableError(f"`manylora serve` ended with status {process.wait()} before it was ready")
