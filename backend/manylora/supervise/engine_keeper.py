"""Keeps the engine process running: starts it, waits for its end, starts it again."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from manylora.backoff import Backoff
from manylora.config import EngineConfig
from manylora.errors import ManyloraError, UnavailableError
from manylora.supervise.engine_process import EngineProcess

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0
STEADY_S = 60.0
"""An engine that has served for so long begins a new series of pauses when it dies."""


class EngineKeeper:
    """Keeps an engine running: restarts one that has died, after pauses of 1, 2, 4 .. 30 s."""

    def __init__(self, config: EngineConfig, socket_path: Path) -> None:
        self._config = config
        self._socket_path = socket_path
        self._is_stopping = threading.Event()
        # Guards _process against a start that meets stop().
        self._lock = threading.Lock()
        self._process: EngineProcess | None = None
        self._thread = threading.Thread(target=self._watch, name="manylora-keeper", daemon=True)

    @property
    def pid(self) -> int | None:
        """Of the engine process, while there is one."""
        process = self._process
        return process.pid if process else None

    def start(self) -> None:
        """Start the engine for the first time.

        Raises:
            ManyloraError: it cannot start; it is not tried again.
        """
        self._start_process(strict_preload=True).wait_ready()
        self._thread.start()

    def stop(self) -> None:
        """End the engine for good."""
        self._is_stopping.set()
        with self._lock:
            process = self._process
        if process:
            process.stop()
        if self._thread.is_alive():
            self._thread.join()

    def _start_process(self, *, strict_preload: bool) -> EngineProcess:
        with self._lock:
            if self._is_stopping.is_set():
                raise UnavailableError("the engine is being stopped")
            self._process = EngineProcess(self._config, self._socket_path, strict_preload=strict_preload)
            return self._process

    def _watch(self) -> None:
        backoff = Backoff(first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S, steady_s=STEADY_S)
        ready_at = time.monotonic()
        while True:
            self._wait_for_end()
            if self._is_stopping.is_set():
                return
            pause_s = backoff.fail(succeeded_s=time.monotonic() - ready_at)
            log.error("the engine is started again in %g s", pause_s)
            if self._is_stopping.wait(pause_s):
                return
            self._start_again()
            # A start may take minutes: one that dies as soon as it serves must not pass for steady.
            ready_at = time.monotonic()

    # A fault of any kind ends one turn of the watch and not its thread: without the thread, no engine would
    # ever be started again.

    def _wait_for_end(self) -> None:
        process = self._process
        assert process, "a watch without an engine process"
        try:
            status = process.wait()
            if not self._is_stopping.is_set():
                log.error("the engine process ended with status %d", status)
            process.stop()
        except Exception:
            log.exception("the engine process %d cannot be watched any more and is ended", process.pid)
            self._end(process)

    def _start_again(self) -> None:
        try:
            # All its adapters were valid once. One that has broken since must not keep the others down.
            self._start_process(strict_preload=False).wait_ready()
            log.info("the engine is back")
        except (ManyloraError, OSError) as error:
            log.error("the engine could not be started again: %s", error)
        except Exception:
            log.exception("the engine could not be started again")
            if self._process:
                self._end(self._process)

    def _end(self, process: EngineProcess) -> None:
        try:
            process.stop()
        except Exception:
            log.exception("the engine process %d could not be ended in order", process.pid)
