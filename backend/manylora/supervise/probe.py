"""Non-blocking questions to sockets of this machine. None is a request to a model, so none is counted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import socket
from pathlib import Path

REPLY_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 1 << 22
"""More than tritonserver's metrics take."""

_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)", re.IGNORECASE)
_STATUS = re.compile(r"HTTP/1\.[01] (\d{3})\b")


class Probe:
    """One question in flight. It is over when there is an answer or a reason why there is none."""

    def __init__(
        self, address: str | Path, ask: bytes = b"", *, connection: socket.socket | None = None
    ) -> None:
        """Connect, and send once there is a connection.

        Args:
            address: host:port, or the path of a Unix socket.
            ask: what to send. The other side closes the connection after its answer.
            connection: an open one to this address; None: connect.
        """
        self.answer = b""
        self.failure: OSError | None = None
        self._ask = ask
        self._socket = connection
        try:
            self._socket = connection or _connect(address)
        except OSError as error:
            self.failure = error

    @property
    def nobody_is_there(self) -> bool:
        """Whether nobody listens or the peer hung up. Other failures are on our own side."""
        return isinstance(self.failure, ConnectionError | FileNotFoundError)

    def poll(self, wait_s: float) -> bool:
        """Wait a while. Returns whether it is over."""
        try:
            while self._socket and not self.failure:
                waiting_to_send = [self._socket] if self._ask else []
                readable, writable, _ = select.select([self._socket], waiting_to_send, [], wait_s)
                if writable:
                    self._send(self._socket)
                elif not readable:
                    return False
                elif not self._receive(self._socket):
                    return True
        except OSError as error:
            self.failure = error
        return True

    def close(self) -> None:
        if self._socket:
            self._socket.close()

    def _send(self, connection: socket.socket) -> None:
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self._ask = self._ask[connection.send(self._ask) :]

    def _receive(self, connection: socket.socket) -> bool:
        """Read on. Returns whether there may be more."""
        part = connection.recv(65536)
        self.answer += part
        return bool(part) and len(self.answer) < MAX_ANSWER_BYTES


class HttpProbe(Probe):
    """A GET to tritonserver's HTTP or metrics port."""

    def __init__(self, address: str, path: str) -> None:
        head = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        super().__init__(address, head.encode())


class KeptConnection:
    """A connection to tritonserver that stays open between questions: a server that has too many connections
    to accept another one still answers on it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_accepted = False
        """An answer has come over it; until then the server may not have accepted it yet."""
        self._connection: socket.socket | None = None
        # Made now, so that the server has accepted it before others fill its table.
        with contextlib.suppress(OSError):
            self._connection = _connect(address)

    def acquire(self) -> socket.socket | None:
        """The connection, for one question; None if it has been closed."""
        connection, self._connection = self._connection, None
        # Nothing has been asked, so anything readable is the end of the connection.
        if connection and self.is_accepted and select.select([connection], [], [], 0)[0]:
            connection.close()
            connection = None
        if connection is None:
            self.is_accepted = False
        return connection

    def release(self, connection: socket.socket) -> None:
        """Give the connection back after a whole answer."""
        self._connection = connection
        self.is_accepted = True

    def close(self) -> None:
        if self._connection:
            self._connection.close()


class KeptConnectionProbe(Probe):
    """A GET over a kept connection."""

    def __init__(self, kept: KeptConnection, path: str) -> None:
        self._kept = kept
        head = f"GET {path} HTTP/1.1\r\nHost: {kept.address}\r\n\r\n"
        super().__init__(kept.address, head.encode(), connection=kept.acquire())

    def close(self) -> None:
        if self._socket and not self.failure and self._is_whole():
            self._kept.release(self._socket)
        else:
            super().close()

    def _receive(self, connection: socket.socket) -> bool:
        return super()._receive(connection) and not self._is_whole()

    def _is_whole(self) -> bool:
        head, is_there, body = self.answer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        return bool(is_there) and len(body) >= (int(length[1]) if length else 0)


def http_status(answer: str) -> int:
    """The status of an HTTP answer; 0 if it is none."""
    found = _STATUS.match(answer)
    return int(found[1]) if found else 0


def is_ready(address: str, model: str) -> bool:
    """Say whether Triton calls the model ready, which it goes on doing when the model's process is dead."""
    probe = HttpProbe(address, ready_path(model))
    try:
        return probe.poll(REPLY_TIMEOUT_S) and http_status(probe.answer.decode(errors="replace")) == 200
    finally:
        probe.close()


def server_id(address: str) -> str:
    """The `--id` of the tritonserver that answers; empty where none does, or something else."""
    probe = HttpProbe(address, "/v2")
    try:
        if not probe.poll(REPLY_TIMEOUT_S):
            return ""
        body = probe.answer.decode(errors="replace").partition("\r\n\r\n")[2]
        return str(json.loads(body)["name"])
    except (ValueError, TypeError, KeyError):
        return ""
    finally:
        probe.close()


def ready_path(model: str) -> str:
    """What Triton answers with status 200 when it calls the model ready."""
    return f"/v2/models/{model}/ready"


def _connect(address: str | Path) -> socket.socket:
    """Begin to connect."""
    target: str | tuple[str, int]
    if isinstance(address, Path):
        family, target = socket.AF_UNIX, str(address)
    else:
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        target = (host.strip("[]"), int(port))
    connection = socket.socket(family)
    try:
        connection.setblocking(False)
        connection.connect(target)
    except BlockingIOError as error:
        # A Unix socket has no connection that is being made: its queue is full.
        if error.errno != errno.EINPROGRESS:
            connection.close()
            raise
    except OSError:
        connection.close()
        raise
    return connection
