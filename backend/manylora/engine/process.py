"""The engine process: `python -m manylora.engine.process`, started by `manylora.supervise.engine_process`.

It reads one JSON line from standard input, `{"socket": path, "config": {...}, "strict_preload": true}` (the
last may be left out; false: an adapter that cannot be preloaded fails alone), and answers with one on
standard output: `{"ready": true}` or `{"error": {"code": ..., "message": ...}}`, among the empty lines of its
pulse. It ends when its standard input does, so it never outlives its owner, however that one ended.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from manylora import paths, run_dir
from manylora.config import EngineConfig
from manylora.errors import InternalError, InvalidArgumentError, ManyloraError
from manylora.supervise import hang_detector
from manylora.supervise.hang_detector import HangDetector
from manylora.supervise.pulse import Pulse

if TYPE_CHECKING:
    from manylora.engine.engine import Engine
    from manylora.engine.server import EngineServer

log = logging.getLogger("manylora.engine.process")

CLOSE_S = 20.0
"""An engine that has not closed after so long is ended by force."""


class _Owner:
    """The process that started this one, as standard input and output show it."""

    def __init__(self) -> None:
        """Take its order.

        Raises:
            InvalidArgumentError: standard input has no order.
        """
        self.has_gone = threading.Event()
        self._is_waiting = True
        # What libraries print must not reach the owner's pipe.
        reply_fd = os.dup(1)
        os.dup2(2, 1)
        # Ctrl-C in the server's terminal is for the server.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A thread of its own waits for SIGTERM, so that it works during a long load, too. An ignored
        # signal, as a parent may hand down, would never arrive.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # After that, since a thread keeps the mask that it starts with.
        self._pulse = Pulse(reply_fd)
        self.order = _read_order()
        for watch in (self._watch_input, self._watch_signal):
            threading.Thread(target=watch, name="manylora-owner", daemon=True).start()

    def reply_ready(self) -> None:
        """Answer that the engine serves. Until then the owner's end ends this process on the spot."""
        self._reply({"ready": True})

    def reply_error(self, error: ManyloraError) -> None:
        """Answer that the start has failed; does nothing once it had not."""
        if self._is_waiting:
            self._reply({"error": {"code": error.code, "message": error.message}})

    def _reply(self, answer: dict[str, Any]) -> None:
        self._is_waiting = False
        self._pulse.answer(json.dumps(answer))

    def _watch_input(self) -> None:
        while os.read(0, 4096):
            pass
        self._leave("its owner has gone")

    def _watch_signal(self) -> None:
        signal.sigwait({signal.SIGTERM})
        self._leave("SIGTERM")

    def _leave(self, why: str) -> None:
        if self._is_waiting:
            # Nothing is served yet, and loading cannot be interrupted otherwise.
            os._exit(1)
        log.info("the engine ends: %s", why)
        watchdog = threading.Timer(CLOSE_S, os._exit, args=(1,))
        watchdog.daemon = True
        watchdog.start()
        self.has_gone.set()


def serve(owner: _Owner) -> None:
    """Load the engine, serve it until the owner has gone, close it.

    Raises:
        ManyloraError: the engine cannot start, or its thread has died.
    """
    socket_path = paths.from_text(owner.order["socket"])
    lock = run_dir.lock(socket_path)
    config = EngineConfig.from_json(json.dumps(owner.order["config"]))
    # Here, since they import torch, which takes seconds: the owner is watched by now.
    from manylora.engine.engine import Engine
    from manylora.engine.server import EngineServer

    engine = Engine(config, strict_preload=owner.order.get("strict_preload", True))
    server = None
    try:
        server = EngineServer(engine, socket_path)
        owner.reply_ready()
        _watch(owner, engine, server)
    finally:
        engine.close()
        if server:
            server.close()
        os.close(lock)


def _watch(owner: _Owner, engine: Engine, server: EngineServer) -> None:
    """Wait until the owner has gone. A thread that hangs ends this process; the owner starts another one.

    Raises:
        InternalError: a thread has ended by itself. Its traceback is in the log.
    """
    watches = {"engine": HangDetector(), "socket": HangDetector()}
    while not owner.has_gone.wait(hang_detector.LOOK_S):
        if not engine.is_alive:
            raise InternalError("the engine's thread has ended by itself")
        if not server.is_alive:
            raise InternalError("the socket's thread has ended by itself")
        # The socket's thread wakes by itself, to probe its peers.
        engine.wake()
        for (name, watch), num_turns in zip(
            watches.items(), (engine.num_turns, server.num_turns), strict=True
        ):
            if watch.is_stuck(num_turns, time.process_time()):
                log.critical("the %s's thread hangs; the process ends. All threads:", name)
                faulthandler.dump_traceback()
                # An orderly end would wait for that thread.
                os._exit(1)


def main() -> int:
    """Run the process.

    Returns: the exit status: 0 after an orderly end, 1 after a failed start, 2 without a readable order.
    """
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        owner = _Owner()
    except (InvalidArgumentError, ValueError) as error:
        print(f"manylora.engine.process: {error}", file=sys.stderr)
        return 2
    try:
        serve(owner)
    except ManyloraError as error:
        log.error("%s", error.tagged())
        owner.reply_error(error)
        return 1
    except Exception:
        log.exception("the engine process failed")
        owner.reply_error(InternalError("the engine could not start; the server's log has the reason"))
        return 1
    return 0


def _read_order() -> dict[str, Any]:
    # Byte by byte: what follows the line is the watch's.
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise InvalidArgumentError("standard input ended before a line with the configuration")
        line += byte
    order: dict[str, Any] = json.loads(line)
    return order


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # All is closed. The interpreter would take seconds more to take torch apart.
    os._exit(status)
