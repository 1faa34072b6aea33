"""The engine's side of the local socket: `manylora.ipc` is the front ends' side."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from manylora import ipc
from manylora.errors import ManyloraError
from manylora.ipc import Event, Outbox
from manylora.messages import (
    Batch,
    Cancel,
    EngineInfo,
    Failed,
    FromEngine,
    Generate,
    GetStatus,
    Hello,
    Status,
    ToEngine,
)

log = logging.getLogger(__name__)

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode

_PROBE_S = 1.0
_LINGER_MS = 1000


class ServedSession(Protocol):
    """What the server needs of `engine.Session`."""

    def send(self, message: Generate | Cancel) -> None: ...

    def close(self) -> None: ...


class ServedEngine(Protocol):
    """What the server needs of `Engine`."""

    info: EngineInfo

    def connect(self, deliver: Callable[[list[Event]], None]) -> ServedSession: ...

    def status(self) -> Status: ...


class EngineServer:
    """Serves an engine on a socket, one session for each front end.

    One thread owns the zmq socket. A front end that has gone is noticed when events for it cannot be
    delivered, or by a probe each second, and its session is closed.
    """

    def __init__(self, engine: ServedEngine, socket_path: Path) -> None:
        """Bind and begin to serve. A socket file that an earlier engine has left is replaced."""
        self._engine = engine
        self._sessions: dict[bytes, ServedSession] = {}
        self._outbox: Outbox[tuple[bytes, FromEngine]] = Outbox()
        self._is_closing = False
        self.num_turns = 0
        """Of the thread, which takes one at least every second."""
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        # Sending to a front end that is not there raises EHOSTUNREACH instead of doing nothing.
        self._router.set(zmq.ROUTER_MANDATORY, 1)
        self._router.set(zmq.SNDHWM, 0)
        self._router.set(zmq.RCVHWM, 0)
        self._router.bind(ipc.address(socket_path))
        self._socket_path = socket_path
        self._thread = threading.Thread(target=self._run, name="manylora-ipc", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs. False before `close` means a fault of ours."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Send what is due, end the thread and remove the socket. Close the engine first."""
        self._is_closing = True
        self._outbox.wake()
        self._thread.join()
        self._socket_path.unlink(missing_ok=True)

    # From here on: the thread's own methods.

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._outbox.fileno(), zmq.POLLIN)
        probe_at = time.monotonic() + _PROBE_S
        while not self._is_closing:
            self.num_turns += 1
            poller.poll(round(_PROBE_S * 1000))
            with contextlib.suppress(zmq.Again):
                while True:
                    peer, frame = self._router.recv_multipart(zmq.NOBLOCK)
                    self._take(peer, frame)
            self._send_all()
            if time.monotonic() >= probe_at:
                for peer in list(self._sessions):
                    self._send(peer, b"")
                probe_at = time.monotonic() + _PROBE_S
        self._send_all()
        self._router.close(_LINGER_MS)
        self._context.term()
        self._outbox.close()

    def _take(self, peer: bytes, frame: bytes) -> None:
        try:
            message = _decode(frame)
            if isinstance(message, Hello):
                if peer not in self._sessions:
                    self._sessions[peer] = self._engine.connect(
                        lambda events: self._outbox.put((peer, Batch(events)))
                    )
                self._send(peer, _encode(self._engine.info))
            elif isinstance(message, GetStatus):
                # The engine answers between two steps, which may take long: tokens must not wait behind it.
                threading.Thread(target=self._answer_status, args=(peer,), daemon=True).start()
            elif (session := self._sessions.get(peer)) is not None:
                session.send(message)
            # Else it was meant for an earlier engine, and has been given up by its sender.
        except Exception:
            log.exception("a front end's message could not be taken")

    def _answer_status(self, peer: bytes) -> None:
        try:
            self._outbox.put((peer, self._engine.status()))
        except ManyloraError as error:
            log.warning("no status: %s", error)

    def _send_all(self) -> None:
        for peer, message in self._outbox.drain():
            try:
                frame = _encode(message)
            except UnicodeEncodeError:
                log.exception("events that cannot be encoded; their sequences end with INTERNAL")
                assert isinstance(message, Batch)
                frame = _encode(
                    Batch([Failed(event.id, "INTERNAL", "see the engine's log") for event in message.events])
                )
            self._send(peer, frame)

    def _send(self, peer: bytes, frame: bytes) -> None:
        try:
            self._router.send_multipart((peer, frame), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            session = self._sessions.pop(peer, None)
            if session is not None:
                log.info("a front end has gone; its sequences are cancelled")
                session.close()
