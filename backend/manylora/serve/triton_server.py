"""One tritonserver process with its stubs, from its start until nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from manylora.paths import SHARED_MEMORY
from manylora.process_state import is_stopped
from manylora.serve import limits, processes
from manylora.serve.installation import Installation
from manylora.serve.ports import Ports
from manylora.serve.server_log import ServerLog

UNLOAD_GRACE_S = 10
"""Time for tritonserver to unload the models, which ends the engine, once nothing is in flight."""
CHILDREN_GRACE_S = 5.0
"""Time for the engine to end by itself once tritonserver and its stubs are gone."""

MAX_STOPPED_LOOKS = 12
"""Looks in a row at a process that a signal has stopped. If all were stopped, with us, not all resume at
once."""

MIN_FREE_DESCRIPTORS = 4
"""A server with fewer cannot accept a connection for sure: others come and go while they are counted."""

ENGINE = "manylora.engine.process"
"""Part of the engine's command line."""
MAX_LINE = 400
"""Characters of a log line that are shown."""

_CHATTER = re.compile(
    r"[|+]|I\d{4} |\s*<frozen |Loading weights:|Error: Failed to initialize NVML"
    r"|W\d{4} .*(?:pinned|DCGM)|E\d{4} .*CudaDriverHelper"
)
"""Tables, lines of the level INFO, frames of the import system, progress, and that there is no GPU."""
_OWN_ERROR = re.compile(
    r"\[(?:INVALID_ARG|NOT_FOUND|UNSUPPORTED|UNAVAILABLE|INTERNAL)\] .+?(?=\\n\\nAt:|\s*\||$)", re.MULTILINE
)
"""One of our own errors, up to where Triton's text continues."""


class TritonServer:
    """A running tritonserver. Only one at a time, since stopping it ends every child of this process."""

    def __init__(
        self,
        installation: Installation,
        *,
        env: Mapping[str, str],
        backends: Path,
        repository: Path,
        ports: Ports,
        log_path: Path,
        exit_timeout_s: int,
        restrictions: Sequence[str],
        shared_memory_bytes: int,
    ) -> None:
        """Start it.

        Args:
            restrictions: words of its command line that close its interfaces for the operator.
            shared_memory_bytes: to which requests may make a model's region of shared memory grow.
        """
        self._log = ServerLog(log_path)
        self._exit_timeout_s = exit_timeout_s
        self._shm_prefix = f"manylora_{secrets.token_hex(6)}_"
        self.id = secrets.token_hex(16)
        """Tells it apart from other servers on its ports."""
        command = [
            str(installation.binary),
            f"--id={self.id}",
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--model-control-mode=none",
            # Both configurations are complete; completing them would start each front end twice.
            "--disable-auto-complete-config",
            f"--http-address={ports.host}",
            f"--grpc-address={ports.host}",
            f"--metrics-address={ports.host}",
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={ports.metrics}",
            f"--exit-timeout-secs={exit_timeout_s + UNLOAD_GRACE_S}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            *restrictions,
        ]

        def prepare() -> None:
            # Nothing else would stop it when we are killed.
            processes.end_with_parent()
            limits.bound_files(shared_memory_bytes)

        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log.write_end,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=installation.working_directory,
            # Ctrl-C goes to the terminal's whole foreground group; only we stop tritonserver.
            start_new_session=True,
            # No other Python thread runs here that could hold a lock at the fork.
            preexec_fn=prepare,
        )
        self._log.close_write_end()
        self._stubs: set[int] = set()
        self._num_stopped_looks = 0
        self._was_killed = False

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def remember_stubs(self) -> None:
        """Record the processes that run the models. Each must live as long as the server."""
        self._stubs.update(_stubs_below(self._process.pid))

    def problem(self) -> str:
        """What has died or been stopped, if anything; looked at four times a second.

        tritonserver itself notices no dead stub.
        """
        self._log.look()
        code = self._process.poll()
        if code is not None:
            return f"tritonserver has ended with {_describe(code)}"
        dead = {pid for pid in self._stubs if not processes.is_alive(pid)}
        # Also one that ended before it was first looked at.
        dead.update(processes.dead_children(self._process.pid))
        if dead:
            return f"a model's process has died (pid {', '.join(map(str, sorted(dead)))})"
        stopped = [pid for pid in (self._process.pid, *sorted(self._stubs)) if is_stopped(pid)]
        self._num_stopped_looks = self._num_stopped_looks + 1 if stopped else 0
        if self._num_stopped_looks < MAX_STOPPED_LOOKS:
            return ""
        return f"a signal has stopped a process (pid {', '.join(map(str, stopped))})"

    @property
    def is_full(self) -> bool:
        """Whether it has so many connections that it cannot accept another one."""
        return limits.num_free_descriptors(self._process.pid) < MIN_FREE_DESCRIPTORS

    def stop(self, is_urgent: Callable[[], bool]) -> None:
        """Stop in order: what is in flight may finish until the exit timeout, and then ends with UNAVAILABLE.

        What does not end in order is killed.

        Args:
            is_urgent: polled meanwhile; true means to kill at once.
        """
        if self._was_killed:
            return
        # With a dead stub, tritonserver would only wait for its exit timeout.
        if not self.problem():
            self._process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + self._exit_timeout_s
            self._await_end(deadline, lambda: is_urgent() or not self._engines())
            # The engine tells its clients before it ends. tritonserver alone would break their connections.
            for pid in self._engines():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            # Without an engine all requests have been answered. tritonserver 24.10 may still wait: it loses
            # count of cancelled streams.
            self._await_end(time.monotonic() + UNLOAD_GRACE_S, is_urgent)
        self.kill()

    def _engines(self) -> list[int]:
        below = [child for stub in self._stubs for child in processes.children(stub)]
        return [pid for pid in below if ENGINE in processes.command(pid)]

    def _await_end(self, deadline: float, is_over: Callable[[], bool]) -> None:
        while self.is_running and time.monotonic() < deadline and not is_over():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)

    def kill(self) -> list[int]:
        """Stop at once. What is in flight is lost. Removes what tritonserver leaves behind.

        Returns:
            Processes that are left because they wait in the kernel, where no signal reaches them.
        """
        if self.is_running:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CHILDREN_GRACE_S)
        # Orphaned stubs are our children now, and no use to anybody; their end is what ends the engine.
        for pid in _stubs_below(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        left = processes.end_children(CHILDREN_GRACE_S)
        for region in SHARED_MEMORY.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        self._log.close()
        self._was_killed = True
        return left

    def log_tail(self, max_lines: int = 25) -> str:
        """The end of this server's log, preceded by our own errors in it."""
        text = self._log.tail()
        own = list(dict.fromkeys(_OWN_ERROR.findall(text)))
        lines = [line[:MAX_LINE] for line in text.splitlines() if line.strip() and not _CHATTER.match(line)]
        # Triton repeats each of them several times.
        lines = [line for line in lines if not any(error[:MAX_LINE] in line for error in own)]
        return "\n".join([*own[:3], *lines[-max_lines:]])


def _stubs_below(pid: int) -> list[int]:
    """The processes that run models, among the children of a process."""
    return [
        child
        for child in processes.children(pid)
        if any("python_backend_stub" in word for word in processes.command(child)[:1])
    ]


def _describe(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
