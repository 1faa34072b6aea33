"""Kept-alive HTTP connections, shared by threads, and one request and answer on one of them."""

from __future__ import annotations

import contextlib
import http.client
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping

from manylora_client.errors import Cancelled, ConnectionFailed, InvalidArgument, from_connection
from manylora_client.transport import Deadline

_MAX_IDLE = 64
# Gateways forget idle connections without a word; what is sent on such a one is never answered.
_MAX_IDLE_S = 15.0
_READ_BYTES = 65536


class ConnectionPool:
    """Hands out connections to one server, each to one user at a time.

    tritonclient's own HTTP connections are bound to the thread that made them (gevent) and cannot be shared.
    """

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        # With the time when each was given back, the latest last.
        self._idle: list[tuple[http.client.HTTPConnection, float]] = []
        self._closed = False
        # Guards _idle and _closed.
        self._lock = threading.Lock()

    def acquire(self, timeout_s: float | None) -> http.client.HTTPConnection:
        """A connected connection. Give it back with `release`, or close it.

        Args:
            timeout_s: bound for connecting and for each read and write.

        Raises:
            OSError: the server cannot be reached.
            ConnectionFailed: the pool is closed.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise ConnectionFailed("the client is closed")
                connection, since_s = self._idle.pop() if self._idle else (None, 0.0)
            if connection is None:
                return self._connect(timeout_s)
            # Readable while idle: the server has closed it.
            if time.monotonic() - since_s < _MAX_IDLE_S and not _has_input(connection):
                connection.sock.settimeout(timeout_s)
                return connection
            connection.close()

    def release(self, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose last answer has been read to its end."""
        with self._lock:
            if not self._closed and connection.sock is not None and len(self._idle) < _MAX_IDLE:
                self._idle.append((connection, time.monotonic()))
                return
        connection.close()

    def close(self) -> None:
        """Close all idle connections; those in use are closed when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def _connect(self, timeout_s: float | None) -> http.client.HTTPConnection:
        connection = (
            http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
            if self._tls is None
            else http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)
        )
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection


def _has_input(connection: http.client.HTTPConnection) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection.sock, selectors.EVENT_READ)
        return bool(selector.select(timeout=0))


class Exchange:
    """One request and its answer on a connection, which it gives back or closes at the end."""

    def __init__(
        self, connection: http.client.HTTPConnection, pool: ConnectionPool, address: str, deadline: Deadline
    ) -> None:
        self._connection = connection
        self._pool = pool
        self._address = address
        self._deadline = deadline
        # The connection forgets its socket when the server asks to close after the answer.
        self._socket = connection.sock
        self._response: http.client.HTTPResponse | None = None
        # Bytes of the body still to come; None where chunks or the connection's end say when it is over.
        self._left: int | None = None
        self._is_reusable = True
        self._ended = False
        self._closed = False
        # Guards _ended, which is set once, by the reader or by whoever closes first.
        self._lock = threading.Lock()

    def send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send the request; the answer is waited for by the first read.

        Raises:
            ConnectionFailed, Timeout: the connection broke or stalled.
            InvalidArgument: a header cannot be sent.
        """
        with self._mapped():
            self._socket.settimeout(self._deadline.remaining_s())
            try:
                self._connection.request(method, path, body, dict(headers))
            except ValueError as error:
                raise InvalidArgument(f"the request cannot be sent: {error}") from error
            except BrokenPipeError:
                # A gateway that refuses a long request answers before it has read all of it. Without an
                # answer, the first read says that the connection is broken.
                self._is_reusable = False

    @property
    def status(self) -> int:
        """The answer's HTTP status. Waits for it, and raises, as `read`."""
        with self._mapped():
            return self._answer().status

    def header(self, name: str) -> str:
        """A header of the answer, empty if it has none. Waits for it, and raises, as `read`."""
        with self._mapped():
            return self._answer().getheader(name) or ""

    def read(self) -> bytes:
        """Wait for the next part of the answer's body. Empty at its end.

        Raises:
            Cancelled: another thread has closed this exchange.
            ConnectionFailed: the connection broke before the end.
            Timeout: the deadline has passed.
        """
        with self._mapped():
            answer = self._answer()
            self._socket.settimeout(self._deadline.remaining_s())
            # Not read(), which waits for as much as was asked for, past the deadline if it comes slowly.
            size = _READ_BYTES if self._left is None else min(_READ_BYTES, self._left)
            part = answer.read1(size) if size else b""
            if self._left is not None:
                self._left -= len(part)
            if not part:
                # An answer that is closed under a read may look like one that has come to its end.
                if self._left or self._closed:
                    raise http.client.IncompleteRead(b"", self._left)
                self._give_back(answer)
            return part

    def read_all(self) -> bytes:
        """Wait for the whole body. Raises as `read`."""
        return b"".join(iter(self.read, b""))

    def close(self) -> None:
        """Close the connection, unless it has been given back. The server then cancels the request."""
        self._closed = True
        self._abort()

    def _answer(self) -> http.client.HTTPResponse:
        if self._response is None:
            self._socket.settimeout(self._deadline.remaining_s())
            answer = self._response = self._connection.getresponse()
            self._left = None if answer.chunked else answer.length
            if self._left is None and not answer.chunked and answer.status == 200:
                # http.client takes a head that breaks off for a whole one. Triton always says how long its
                # answers are; error pages of gateways may end with their connection.
                raise ConnectionFailed(f"the answer of {self._address} broke off in its head")
        return self._response

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            closed = self._closed
            self._abort()
            # A connection that is closed under a read lets it fail in many ways.
            if closed and isinstance(error, Exception):
                raise Cancelled("closed before the whole answer was read") from error
            if isinstance(error, (OSError, http.client.HTTPException)):
                raise from_connection(error, self._address) from error
            raise

    def _abort(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        # Wakes a thread that waits in a read. Fails if the server has closed already, which does as well.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        if self._response is not None:
            self._response.close()

    def _give_back(self, answer: http.client.HTTPResponse) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        answer.close()
        if self._is_reusable:
            self._pool.release(self._connection)
        else:
            self._connection.close()
