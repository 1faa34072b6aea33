"""Keeps a tritonserver running: starts it, waits until its models answer, restarts it when one has died."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from manylora.backoff import Backoff
from manylora.errors import UnavailableError
from manylora.run_dir import health_path
from manylora.supervise.model_watch import ModelWatch
from manylora.supervise.probe import Probe, is_ready, server_id
from manylora.supervise.stop_signals import StopSignals

LOOK_INTERVAL_S = 0.25
"""Between two looks at the processes and the signals."""
START_GRACE_LOOKS = 20
"""Looks for which a start goes on with a model's process dead: tritonserver may come to end it by itself."""
MAX_FAILURES = 6
"""In a row, after which a server that had been ready is given up."""
STEADY_S = 60.0
"""A server that was up so long has not failed at its start."""
FIRST_PAUSE_S = 2.0
"""Before the second restart in a row; the first one follows at once."""
MAX_PAUSE_S = 30.0


class Server(Protocol):
    """A tritonserver, as `serve.triton_server` has it."""

    id: str

    @property
    def is_running(self) -> bool: ...
    @property
    def is_full(self) -> bool: ...
    def problem(self) -> str: ...
    def remember_stubs(self) -> None: ...
    def log_tail(self) -> str: ...
    def stop(self, is_urgent: Callable[[], bool], /) -> None: ...
    def kill(self) -> list[int]: ...


class _Stop(Exception):
    """Raised where the supervisor may stop, never by a signal's handler."""


class Supervisor:
    """Owns the one tritonserver of this process."""

    def __init__(
        self,
        start: Callable[[], Server],
        *,
        models: Sequence[str],
        address: str,
        metrics_address: str,
        run_dir: Path,
        ready_timeout_s: float,
        on_ready: Callable[[], None],
        say: Callable[[str], None],
        signals: StopSignals,
    ) -> None:
        self._start = start
        self._models = models
        self._address = address
        self._metrics_address = metrics_address
        self._run_dir = run_dir
        self._ready_timeout_s = ready_timeout_s
        self._on_ready = on_ready
        self._say = say
        self._signals = signals
        self._server: Server | None = None
        self.was_ready = False
        self._watches: list[ModelWatch] = []

    def run(self) -> None:
        """Serve until a signal asks to stop. Nothing of the server is left when this returns or raises.

        Raises:
            UnavailableError: the server did not start, or died and could not be started again.
        """
        try:
            self._pause(0)
            self._server = self._start()
            self._await_answers(self._server)
            self.was_ready = True
            self._on_ready()
            backoff = Backoff(first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S, steady_s=STEADY_S, num_immediate=1)
            while True:
                ready_at = time.monotonic()
                problem = self._watch(self._server)
                self._restart(problem, backoff, succeeded_s=time.monotonic() - ready_at)
        except _Stop:
            pass
        finally:
            self._close_watches()
            if self._server:
                self._server.stop(lambda: self._signals.is_urgent)

    def _pause(self, seconds: float) -> None:
        """Sleep, but no longer than until a signal comes."""
        end = time.monotonic() + seconds
        while not self._signals.first and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_INTERVAL_S))
        if self._signals.first:
            raise _Stop

    def _await_answers(self, server: Server) -> None:
        """Wait until Triton calls all models ready and all front ends report.

        An answer from any other server on its port is not accepted.
        """
        deadline = time.monotonic() + self._ready_timeout_s
        waiting = list(self._models)
        num_bad_looks = 0
        while waiting:
            if not server.is_running:
                raise UnavailableError(f"tritonserver did not start\n{server.log_tail()}")
            server.remember_stubs()
            num_bad_looks = num_bad_looks + 1 if server.problem() else 0
            if num_bad_looks > START_GRACE_LOOKS:
                # The other model would wait for the engine of a dead one, and tritonserver for both.
                raise UnavailableError(f"{server.problem()} while it started\n{server.log_tail()}")
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{' and '.join(waiting)} not ready in {self._ready_timeout_s:.0f} s\n{server.log_tail()}"
                )
            self._pause(LOOK_INTERVAL_S)
            found = server_id(self._address)
            if found and found != server.id:
                raise UnavailableError(f"another server, {found!r}, answers on {self._address}")
            if found:
                waiting = [model for model in waiting if not is_ready(self._address, model)]
        for model in self._models:
            self._await_answer(server, model, deadline)
        server.remember_stubs()

    def _await_answer(self, server: Server, model: str, deadline: float) -> None:
        probe = Probe(health_path(self._run_dir, model))
        try:
            while not (is_over := probe.poll(LOOK_INTERVAL_S)) and time.monotonic() < deadline:
                self._pause(0)
        finally:
            probe.close()
        if not probe.answer:
            why = probe.failure or ("it hangs up" if is_over else "none in time")
            raise UnavailableError(f"{model} is ready but gives no answer: {why}\n{server.log_tail()}")

    def _watch(self, server: Server) -> str:
        """Look at the server until something is wrong with it.

        Returns: what is wrong.
        """
        self._close_watches()
        self._watches = [
            ModelWatch(
                model,
                health=health_path(self._run_dir, model),
                http=self._address,
                metrics=self._metrics_address,
                is_full=lambda: server.is_full,
                say=self._say,
            )
            for model in self._models
        ]
        while True:
            problem = server.problem()
            for watch in self._watches:
                problem = problem or watch.look()
            if problem:
                return problem
            self._pause(LOOK_INTERVAL_S)

    def _close_watches(self) -> None:
        for watch in self._watches:
            watch.close()
        self._watches.clear()

    def _restart(self, problem: str, backoff: Backoff, succeeded_s: float) -> None:
        """Replace a server that no longer serves by a new one, and wait until that one answers.

        Args:
            succeeded_s: seconds for which the old one served.

        Raises:
            UnavailableError: no server came up in several attempts.
        """
        pause_s = backoff.fail(succeeded_s)
        while backoff.num_failures < MAX_FAILURES:
            self._say(f"{problem}; starting tritonserver again" + (f" in {pause_s:.0f} s" if pause_s else ""))
            if self._server and (left := self._server.kill()):
                self._say(f"left behind, since they cannot be killed: processes {', '.join(map(str, left))}")
            self._pause(pause_s)
            self._server = self._start()
            try:
                self._await_answers(self._server)
            except UnavailableError as error:
                problem, pause_s = str(error), backoff.fail()
                continue
            self._say("ready again")
            return
        raise UnavailableError(
            f"given up after {backoff.num_failures} failures in a row; the last: {problem}"
        )
