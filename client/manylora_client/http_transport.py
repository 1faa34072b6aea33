"""The client's requests over HTTP: `/infer` for whole answers, `/generate_stream` for streams."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence

from manylora_client import http_wire
from manylora_client.connections import ConnectionPool, Exchange
from manylora_client.errors import from_connection
from manylora_client.request import Request
from manylora_client.transport import Deadline
from manylora_client.types import Chunk


class HttpTransport:
    """A Transport over HTTP."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        path: str = "",
        tls: ssl.SSLContext | None = None,
        headers: Mapping[str, str],
    ) -> None:
        self._address = f"{host}:{port}"
        self._path = path
        self._headers = dict(headers)
        self._pool = ConnectionPool(host, port, tls)

    def infer(self, model: str, request: Request, deadline: Deadline) -> Chunk:
        """See Transport."""
        exchange = self._send(http_wire.infer_call(model, request), deadline)
        answer = exchange.read_all()
        return http_wire.infer_reply(exchange.status, exchange.header(http_wire.HEADER_LENGTH), answer)

    def stream(self, model: str, request: Request, deadline: Deadline) -> HttpReplies:
        """See Transport."""
        return HttpReplies(self._send(http_wire.stream_call(model, request), deadline))

    def is_ready(self, models: Sequence[str], deadline: Deadline) -> bool:
        """See Transport."""
        for call in http_wire.ready_calls(models):
            exchange = self._send(call, deadline)
            exchange.read_all()
            if exchange.status != 200:
                return False
        return True

    def close(self) -> None:
        """See Transport."""
        self._pool.close()

    def _send(self, call: http_wire.Call, deadline: Deadline) -> Exchange:
        try:
            connection = self._pool.acquire(deadline.remaining_s())
        except OSError as error:
            raise from_connection(error, self._address) from error
        exchange = Exchange(connection, self._pool, self._address, deadline)
        exchange.send(call.method, self._path + call.path, call.body, {**self._headers, **call.headers})
        return exchange


class HttpReplies:
    """The replies of one `/generate_stream`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._replies = http_wire.EventReplies()
        self._has_begun = False

    def __next__(self) -> Chunk:
        if not self._has_begun:
            self._begin()
        while (chunk := self._replies.try_next()) is None:
            part = self._exchange.read()
            if not part:
                self._replies.end()
                raise StopIteration
            self._replies.feed(part)
        return chunk

    def close(self) -> None:
        """See Replies."""
        self._exchange.close()

    def _begin(self) -> None:
        kind = self._exchange.header("Content-Type")
        if not http_wire.is_event_stream(kind):
            raise http_wire.stream_error(self._exchange.status, kind, self._exchange.read_all())
        self._has_begun = True
