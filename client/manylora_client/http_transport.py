"""The client's requests over HTTP: `/infer` for whole answers, `/generate_stream` for streams."""

from __future__ import annotations

import json
import ssl
import urllib.parse
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from manylora_client.connections import ConnectionPool, Exchange
from manylora_client.errors import (
    ConnectionFailed,
    Internal,
    InvalidArgument,
    ManyloraClientError,
    from_connection,
    from_http_status,
    from_message,
)
from manylora_client.request import Request
from manylora_client.sse import EventParser
from manylora_client.transport import Deadline, decode
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
        body, header_length = _infer_body(request)
        headers = {"Content-Type": "application/octet-stream"}
        if header_length is not None:
            headers["Inference-Header-Content-Length"] = str(header_length)
        exchange = self._send("POST", f"{_model_path(model)}/infer", body, headers, deadline)
        answer = exchange.read_all()
        if exchange.status != 200:
            raise from_http_status(exchange.status, _error_text(answer))
        return _infer_reply(answer, exchange.header("Inference-Header-Content-Length"))

    def stream(self, model: str, request: Request, deadline: Deadline) -> HttpReplies:
        """See Transport."""
        body = _generate_body(request)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        return HttpReplies(
            self._send("POST", f"{_model_path(model)}/generate_stream", body, headers, deadline)
        )

    def is_ready(self, models: Sequence[str], deadline: Deadline) -> bool:
        """See Transport."""
        paths = ["/v2/health/ready", *(f"{_model_path(model)}/ready" for model in models)]
        for path in paths:
            exchange = self._send("GET", path, b"", {}, deadline)
            exchange.read_all()
            if exchange.status != 200:
                return False
        return True

    def close(self) -> None:
        """See Transport."""
        self._pool.close()

    def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], deadline: Deadline
    ) -> Exchange:
        try:
            connection = self._pool.acquire(deadline.remaining_s())
        except OSError as error:
            raise from_connection(error, self._address) from error
        exchange = Exchange(connection, self._pool, self._address, deadline)
        exchange.send(method, self._path + path, body, {**self._headers, **headers})
        return exchange


class HttpReplies:
    """The replies of one `/generate_stream`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._parser = EventParser()
        self._events: deque[str] = deque()
        self._is_event_stream = False

    def __next__(self) -> Chunk:
        self._check_start()
        while not self._events:
            part = self._exchange.read()
            if not part:
                rest = self._parser.rest()
                if rest:
                    raise ConnectionFailed(f"the stream ended within an event: {rest[:200]!r}")
                raise StopIteration
            try:
                self._events.extend(self._parser.feed(part))
            except UnicodeDecodeError as error:
                raise Internal(f"the server's event is no UTF-8: {error}") from error
        return self._event(self._events.popleft())

    def close(self) -> None:
        """See Replies."""
        self._exchange.close()

    def _check_start(self) -> None:
        if self._is_event_stream:
            return
        kind = self._exchange.header("Content-Type")
        self._is_event_stream = kind.startswith("text/event-stream")
        if not self._is_event_stream:
            text = _error_text(self._exchange.read_all())
            if self._exchange.status != 200:
                raise from_http_status(self._exchange.status, text)
            raise Internal(f"the server's answer is no event stream but {kind!r}: {text[:200]!r}")

    def _event(self, data: str) -> Chunk:
        try:
            fields = json.loads(data)
        except ValueError as error:
            raise Internal(f"the server's event is no JSON: {data[:200]!r}") from error
        if not isinstance(fields, dict):
            raise Internal(f"the server's event is no JSON object: {data[:200]!r}")
        if "error" in fields:
            # The status of an event stream says nothing: on 24.10 every error is a 400.
            raise from_message(str(fields["error"]), Internal)
        return decode(fields.get)


def _model_path(model: str) -> str:
    return f"/v2/models/{urllib.parse.quote(model, safe='')}"


def _infer_body(request: Request) -> tuple[bytes, int | None]:
    if request.text_input is not None:
        tensor = triton.InferInput("text_input", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[request.text_input.encode()]], dtype=np.object_))
    else:
        ids = np.asarray(request.input_ids)[None, :]
        tensor = triton.InferInput("input_ids", list(ids.shape), "INT32")
        tensor.set_data_from_numpy(ids)
    try:
        body, header_length = triton.InferenceServerClient.generate_request_body(
            [tensor], parameters=dict(request.parameters)
        )
    except InferenceServerException as error:
        raise InvalidArgument(f"the request cannot be encoded: {error}") from error
    return body, header_length


def _generate_body(request: Request) -> bytes:
    fields: dict[str, Any] = {"parameters": request.parameters}
    if request.text_input is not None:
        fields["text_input"] = request.text_input
    else:
        fields["input_ids"] = np.asarray(request.input_ids).tolist()
    return json.dumps(fields).encode()


def _infer_reply(answer: bytes, header_length: str) -> Chunk:
    try:
        result = triton.InferenceServerClient.parse_response_body(
            answer, header_length=int(header_length) if header_length else None
        )
        return decode(result.as_numpy)
    except ManyloraClientError:
        raise
    # The parser checks nothing, so a damaged answer fails in any way.
    except Exception as error:
        raise Internal(f"the server's answer cannot be read: {error!r}") from error


def _error_text(answer: bytes) -> str:
    """The message of an error's body: `{"error": ...}`, an event that holds one, or plain text of a proxy."""
    text = answer.decode(errors="replace").strip().removeprefix("data:").strip()
    try:
        fields = json.loads(text)
    except ValueError:
        return text[:1000]
    return str(fields["error"]) if isinstance(fields, dict) and "error" in fields else text[:1000]
