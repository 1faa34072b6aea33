"""Requests and answers of Triton's HTTP endpoints, as bytes; sent and received by the transports."""

from __future__ import annotations

import json
import urllib.parse
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from manylora_client.errors import (
    ConnectionFailed,
    Internal,
    InvalidArgument,
    ManyloraClientError,
    from_http_status,
    from_message,
)
from manylora_client.reply import decode
from manylora_client.request import Request
from manylora_client.sse import EventParser
from manylora_client.types import Chunk

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Header that says how much of a body is JSON; binary tensors follow it."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def ready_calls(models: Sequence[str]) -> list[Call]:
    """Calls that are all answered with 200 when the server and `models` are ready."""
    return [Call("GET", "/v2/health/ready"), *(Call("GET", f"{_model_path(m)}/ready") for m in models)]


def infer_call(model: str, request: Request) -> Call:
    """The call for a whole answer.

    Raises:
        InvalidArgument: tritonclient refuses to encode it.
    """
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
    headers = {"Content-Type": "application/octet-stream"}
    if header_length is not None:
        headers[HEADER_LENGTH] = str(header_length)
    return Call("POST", f"{_model_path(model)}/infer", body, headers)


def infer_reply(status: int, header_length: str, answer: bytes) -> Chunk:
    """Read the answer of `/infer`.

    Args:
        header_length: value of the header HEADER_LENGTH, empty if there is none.

    Raises:
        ManyloraClientError: the answer is an error, or cannot be read.
    """
    if status != 200:
        raise from_http_status(status, _error_text(answer))
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


def stream_call(model: str, request: Request) -> Call:
    """The call for a stream."""
    fields: dict[str, Any] = {"parameters": request.parameters}
    if request.text_input is not None:
        fields["text_input"] = request.text_input
    else:
        fields["input_ids"] = np.asarray(request.input_ids).tolist()
    return Call(
        "POST",
        f"{_model_path(model)}/generate_stream",
        json.dumps(fields).encode(),
        {"Content-Type": "application/json", "Accept": "text/event-stream"},
    )


def is_event_stream(content_type: str) -> bool:
    """Whether an answer of `/generate_stream` is one; otherwise it is an error."""
    return content_type.startswith("text/event-stream")


def stream_error(status: int, content_type: str, answer: bytes) -> ManyloraClientError:
    """The error in an answer of `/generate_stream` that is not an event stream."""
    text = _error_text(answer)
    if status != 200:
        return from_http_status(status, text)
    return Internal(f"the server's answer is no event stream but {content_type!r}: {text[:200]!r}")


class EventReplies:
    """Turns the bytes of an event stream, cut anywhere, into its replies."""

    def __init__(self) -> None:
        self._parser = EventParser()
        self._events: deque[str] = deque()

    def feed(self, received: bytes) -> None:
        """Add the next bytes.

        Raises:
            Internal: they are not UTF-8.
        """
        try:
            self._events.extend(self._parser.feed(received))
        except UnicodeDecodeError as error:
            raise Internal(f"the server's event is no UTF-8: {error}") from error

    def try_next(self) -> Chunk | None:
        """The next reply, None if more bytes are needed for it.

        Raises:
            ManyloraClientError: it is an error, or cannot be read.
        """
        return _read_event(self._events.popleft()) if self._events else None

    def end(self) -> None:
        """No bytes follow.

        Raises:
            ConnectionFailed: an event has begun and not ended.
        """
        rest = self._parser.rest()
        if rest:
            raise ConnectionFailed(f"the stream ended within an event: {rest[:200]!r}")


def _model_path(model: str) -> str:
    return f"/v2/models/{urllib.parse.quote(model, safe='')}"


def _read_event(data: str) -> Chunk:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Internal(f"the server's event is no JSON: {data[:200]!r}") from error
    if not isinstance(fields, dict):
        raise Internal(f"the server's event is no JSON object: {data[:200]!r}")
    if "error" in fields:
        # The status of an event stream says nothing: on 24.10 every error is a 400.
        raise from_message(str(fields["error"]), Internal)
    return decode(fields.get)


def _error_text(answer: bytes) -> str:
    """The message of an error's body: `{"error": ...}`, an event that holds one, or plain text of a proxy."""
    text = answer.decode(errors="replace").strip().removeprefix("data:").strip()
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return text[:1000]
    return str(fields["error"]) if isinstance(fields, dict) and "error" in fields else text[:1000]
