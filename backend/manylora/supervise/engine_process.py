"""One engine process: start, watch and end it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from manylora import errors, paths
from manylora.config import EngineConfig
from manylora.errors import UnavailableError
from manylora.process_state import is_alive
from manylora.supervise.pulse import MAX_SILENT_TURNS, MAX_SILENT_TURNS_AT_START, PulseListener, Silence

log = logging.getLogger(__name__)

STOP_S = 25.0
"""Time for the engine to close, a little more than it gives itself."""
KILL_S = 5.0
"""Time for a killed engine to go."""
LOOK_S = 1.0
HANGS = -999
"""Instead of the exit status of a process of which threads hang in the kernel."""


class EngineProcess:
    """One engine process, from start to end.

    Args:
        strict_preload: whether an adapter that is to be preloaded and cannot be stops the start.
    """

    def __init__(self, config: EngineConfig, socket_path: Path, *, strict_preload: bool = True) -> None:
        # The server's working directory may hold packages of its own (an older numpy), so the engine runs in
        # another one, and relative paths must be made absolute.
        directories = {name: _absolute(getattr(config, name)) for name in ("base_model", "adapter_root")}
        order = {
            "socket": paths.to_text(socket_path.absolute()),
            "config": {**dataclasses.asdict(config), **directories},
            "strict_preload": strict_preload,
        }
        self._order = json.dumps(order).encode() + b"\n"
        # Its own session: Ctrl-C in the server's terminal is for the server.
        self._process = subprocess.Popen(
            [python_executable(), "-m", "manylora.engine.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd="/",
            start_new_session=True,
        )
        assert self._process.stdout
        self._listener = PulseListener(self._process.stdout.fileno(), self.pid)
        # Held while one thread listens, so that another one does not close the pipe under it.
        self._listening = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the engine serves its socket.

        Raises:
            ManyloraError: the engine's own error, or UNAVAILABLE when it ended without one.
        """
        assert self._process.stdin
        # It may have ended, and stop() may have closed the pipe.
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(self._order)
            self._process.stdin.flush()
        while (line := self._listen(MAX_SILENT_TURNS_AT_START)) == b"":
            pass
        if not line:
            status = self.stop()
            raise UnavailableError(
                f"the engine process ended with status {status} before it was ready; see the log"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.stop()
            raise errors.from_code(answer["error"]["code"], answer["error"]["message"])

    def wait(self) -> int:
        """Wait for its end; kill it when it shows no sign of life.

        Returns: the exit status, negative for a signal.
        """
        while self._listen(MAX_SILENT_TURNS) is not None:
            pass
        return self._await_end(KILL_S)

    def _listen(self, max_silent_turns: int) -> bytes | None:
        """The next line of its output; None when it has ended, or was killed for its silence."""
        assert self._process.stdout
        with self._listening:
            try:
                if not self._process.stdout.closed:
                    return self._listener.next_line(max_silent_turns)
            except Silence as silence:
                log.error("the engine process %d hangs and is killed: %s", self.pid, silence)
                self._process.kill()
        return None

    def stop(self) -> int:
        """End it: by closing its standard input, later by force. May be called again and from any thread."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        status = self._await_end(STOP_S)
        if status == HANGS and is_alive(self.pid):
            log.error("the engine process %d does not end; it is killed", self.pid)
            self._process.kill()
            status = self._await_end(KILL_S)
        with self._listening:
            self._process.stdout.close()
        return status

    def _await_end(self, timeout_s: float) -> int:
        """Wait for its end, but not for threads that hang in the kernel, which no signal ends.

        Returns: the exit status; HANGS if it has none yet.
        """
        for _ in range(max(1, round(timeout_s / LOOK_S))):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(LOOK_S)
            if not is_alive(self.pid):
                # Only its first thread has ended. The rest keeps its memory and harms nobody.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._process.wait(LOOK_S)
                log.error("the engine process %d has ended but for threads that hang in the kernel", self.pid)
                break
        return HANGS


def python_executable() -> str:
    """The interpreter of this environment. In a Triton stub `sys.executable` may be something else.

    Raises:
        UnavailableError: none is found.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    venv = os.environ.get("VIRTUAL_ENV")
    folders = [
        Path(sys.prefix) / "bin",
        *([Path(venv) / "bin"] if venv else []),
        Path(sys.base_prefix) / "bin",
    ]
    folders += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    candidates = [Path(sys.executable)] if Path(sys.executable or "").name.startswith("python") else []
    candidates += [folder / name for folder in folders]
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    raise UnavailableError(
        f"no interpreter {name} found beside {sys.prefix} or on PATH to run the engine with"
    )


def environment() -> dict[str, str]:
    """The environment of the engine process.

    It finds the packages that this process finds. Triton's own libraries are left out of its search path:
    they are other versions of libraries that torch needs.
    """
    found = dict(os.environ)
    roots = [_package_root(name) for name in ("manylora", "manylora_kernels", "msgspec")]
    places = [root for root in roots if root] + found.get("PYTHONPATH", "").split(os.pathsep)
    found["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(place for place in places if place))
    # Whatever the locale: messages and names of files are UTF-8.
    found["PYTHONUTF8"] = "1"
    libraries = found.pop("LD_LIBRARY_PATH", "").split(os.pathsep)
    kept = [path for path in libraries if path and "pytriton" not in path and "tritonserver" not in path]
    if kept:
        found["LD_LIBRARY_PATH"] = os.pathsep.join(kept)
    return found


def _absolute(path: str) -> str:
    return paths.to_text(paths.from_text(path).expanduser().absolute()) if path else ""


def _package_root(name: str) -> str | None:
    """The folder that `import name` finds the package in."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return str(Path(spec.submodule_search_locations[0]).resolve().parent)
