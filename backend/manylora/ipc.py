"""The local socket between front ends and the engine process: the front ends' side.

Frames are `manylora.messages` in msgpack; an empty frame only probes whether the other side is there.
`engine/server.py` is the other side.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from manylora import paths
from manylora.errors import UnavailableError
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
    Tokens,
)

Event = Tokens | Failed
Item = TypeVar("Item")

log = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT_MS = 15_000
"""After such a silence the engine's end of a connection counts as dead. zmq's own threads send the
heartbeats."""

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], FromEngine] = msgspec.msgpack.Decoder(FromEngine).decode


def address(socket_path: Path) -> str:
    """zmq's address of the socket. zmq encodes it as UTF-8, whatever the encoding of file names is."""
    return f"ipc://{paths.to_text(socket_path)}"


class Outbox(Generic[Item]):
    """A queue that wakes its consumer from a poll. Putting never blocks."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)

    def fileno(self) -> int:
        """The file descriptor to poll for reading."""
        return self._ear.fileno()

    def put(self, item: Item) -> None:
        self._items.put(item)
        self.wake()

    def wake(self) -> None:
        # A full buffer means that the reader has been woken already, a closed one that there is none.
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    def drain(self) -> list[Item]:
        with contextlib.suppress(BlockingIOError):
            while self._ear.recv(4096):
                pass
        items = []
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._items.get_nowait())
        return items

    def close(self) -> None:
        self._bell.close()
        self._ear.close()


class EngineConnection:
    """A front end's connection to the engine process. It reconnects by itself when the engine is back.

    One thread owns the zmq socket and makes both callbacks; they must not block. Sequences that were sent
    before `on_lost` and have not ended by then never will; later ones are refused until the engine is back.
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        on_events: Callable[[list[Event]], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._on_events = on_events
        self._on_lost = on_lost
        self._outbox: Outbox[bytes] = Outbox()
        # Guards _info and, with it, the order of sends and of the loss of the engine.
        self._changed = threading.Condition()
        self._info: EngineInfo | None = None
        self._is_closing = False
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        # A frame that was on its way when the engine ended reaches the next engine before Hello, and is
        # dropped.
        self._dealer.set(zmq.LINGER, 0)
        self._dealer.set(zmq.SNDHWM, 0)
        self._dealer.set(zmq.RCVHWM, 0)
        self._dealer.set(zmq.RECONNECT_IVL, 100)
        # An engine that was killed with a thread stuck in the kernel leaves its end of the connection open.
        self._dealer.set(zmq.HEARTBEAT_IVL, 2000)
        self._dealer.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        self._monitor = self._dealer.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._dealer.connect(address(socket_path))
        self._socket_path = socket_path
        self._thread = threading.Thread(target=self._run, name="manylora-ipc", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo | None:
        """What the engine has reported about itself; None while there is no engine."""
        return self._info

    def wait_ready(self, timeout_s: float) -> EngineInfo | None:
        """Wait until the engine has answered. None: it has not answered in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._info is not None, timeout_s)
            return self._info

    def send(self, message: Generate | Cancel) -> None:
        """Send a message. Thread-safe, never blocks.

        Raises:
            UnavailableError: there is no engine now.
        """
        frame = _encode(message)
        with self._changed:
            if self._info is None:
                raise UnavailableError("the engine is not running; try again in a while")
            self._outbox.put(frame)

    def close(self) -> None:
        """End the connection. The engine cancels what is still running for it. May be called again."""
        self._is_closing = True
        self._outbox.wake()
        self._thread.join()

    # From here on: the thread's own methods.

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._dealer, self._monitor, self._outbox.fileno()):
            poller.register(source, zmq.POLLIN)
        try:
            while not self._is_closing:
                poller.poll()
                # The monitor's events are read before the messages that arrived ahead of them, and handled
                # after those.
                changes = _receive_all(self._monitor, recv_monitor_message)
                for frame in _receive_all(self._dealer, zmq.Socket.recv):
                    self._receive(frame)
                for change in changes:
                    if change["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                        self._dealer.send(_encode(Hello()), zmq.NOBLOCK)
                    else:
                        self._on_disconnect()
                for frame in self._outbox.drain():
                    self._dealer.send(frame, zmq.NOBLOCK)
        except Exception:
            log.exception("the connection to the engine has failed and ends")
            self._on_disconnect()
        finally:
            self._dealer.disable_monitor()
            self._monitor.close(0)
            self._dealer.close(0)
            self._context.term()
            with self._changed:
                self._info = None
            self._outbox.close()

    def _receive(self, frame: bytes) -> None:
        if not frame:
            return
        try:
            message = _decode(frame)
            if isinstance(message, Batch):
                self._on_events(message.events)
            elif isinstance(message, EngineInfo):
                with self._changed:
                    self._info = message
                    self._changed.notify_all()
        except Exception:
            log.exception("a message from the engine could not be handled")

    def _on_disconnect(self) -> None:
        with self._changed:
            had_engine, self._info = self._info is not None, None
            self._outbox.drain()
        if had_engine:
            try:
                self._on_lost()
            except Exception:
                log.exception("the loss of the engine could not be handled")


def query_status(socket_path: Path, timeout_s: float = 5.0) -> Status:
    """The state of a running engine, for any process of the same user.

    Raises:
        UnavailableError: no engine answers on the socket in time.
    """
    deadline = time.monotonic() + timeout_s
    unavailable = UnavailableError(
        f"no engine answers on {paths.to_text(socket_path)} within {timeout_s:g} s"
    )
    if not socket_path.exists():
        raise UnavailableError(f"no engine: there is no socket {paths.to_text(socket_path)}")
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.IMMEDIATE, 1)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.SNDTIMEO, round(timeout_s * 1000))
        dealer.connect(address(socket_path))
        try:
            dealer.send(_encode(GetStatus()))
        except zmq.Again:
            raise unavailable from None
        while (left_s := deadline - time.monotonic()) > 0 and dealer.poll(max(1, round(left_s * 1000))):
            frame = dealer.recv()
            message = _decode(frame) if frame else None
            if isinstance(message, Status):
                return message
    raise unavailable


def _receive_all(source: Any, receive: Callable[[Any, int], Any]) -> list[Any]:
    received = []
    with contextlib.suppress(zmq.Again):
        while True:
            received.append(receive(source, zmq.NOBLOCK))
    return received
