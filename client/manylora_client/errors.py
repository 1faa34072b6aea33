"""The client's errors, and the one place where every lower error becomes one of them.

Every message of a Manylora front end begins with its code in square brackets. Triton may put text before it
and loses the code itself on `/generate` and on gRPC streams, so the prefix decides; the HTTP status or gRPC
code decides only for messages without one, which come from Triton itself or from a proxy.
"""

from __future__ import annotations

import asyncio
import re
from typing import ClassVar


class ManyloraClientError(Exception):
    """Base of every error that the client raises on purpose."""

    code: ClassVar[str] = ""
    """The server's name of the error; empty for errors that never came from the server."""

    @property
    def message(self) -> str:
        """The text for the user, without the code."""
        return str(self.args[0]) if self.args else ""


class InvalidArgument(ManyloraClientError, ValueError):
    """The request is wrong as it stands: the server, or the client before sending, refused it."""

    code = "INVALID_ARG"


class NotFound(ManyloraClientError, LookupError):
    """The server has no such adapter or model."""

    code = "NOT_FOUND"


class Unsupported(ManyloraClientError):
    """Well-formed, but not served by this server."""

    code = "UNSUPPORTED"


class Unavailable(ManyloraClientError):
    """Cannot be served now: the queue is full, a deadline passed, the engine is down. May be retried."""

    code = "UNAVAILABLE"


class Cancelled(ManyloraClientError):
    """The request was cancelled before it was answered in full."""

    code = "CANCELLED"


class Internal(ManyloraClientError):
    """A fault of the server, or an answer that cannot be read."""

    code = "INTERNAL"


class ConnectionFailed(ManyloraClientError):
    """The server cannot be reached, went away, or broke the stream before its last reply."""


class Timeout(ManyloraClientError):
    """The call took longer than its `timeout`."""


BY_CODE: dict[str, type[ManyloraClientError]] = {
    error.code: error for error in (InvalidArgument, NotFound, Unsupported, Unavailable, Cancelled, Internal)
}

_TAG = re.compile(rf"\[({'|'.join(BY_CODE)})\]\s?(.*)", re.DOTALL)

# Triton's own words where its code means something else, or is lost.
_TRITON_UNAVAILABLE = re.compile(r"Stub process '.*' is not healthy|is not ready|no available versions")
_TRITON_CLOSED = re.compile(r"This (API|protocol) is restricted")
# It names the server's shared memory, and gives advice for whoever started the server.
_TRITON_NO_ROOM = re.compile(r"shared memory (pool|region)|shm_open|/dev/shm|\bmanylora_[0-9a-f]{12}_")
_TRITON_NOT_FOUND = re.compile(r"unknown model: .* is not found")

# gRPC's words for a connection that broke, under codes that also mean other things.
_BROKEN_CALL = re.compile(r"Stream removed|RST_STREAM|Socket closed|Connection reset|GOAWAY", re.IGNORECASE)

_BY_STATUS: dict[int, type[ManyloraClientError]] = {
    404: NotFound,
    408: Timeout,
    429: Unavailable,
    499: Cancelled,
    501: Unsupported,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}

_BY_GRPC_CODE: dict[str, type[ManyloraClientError]] = {
    "CANCELLED": Cancelled,
    "UNKNOWN": Internal,
    "INVALID_ARGUMENT": InvalidArgument,
    "DEADLINE_EXCEEDED": Timeout,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": InvalidArgument,
    "PERMISSION_DENIED": InvalidArgument,
    "UNAUTHENTICATED": InvalidArgument,
    "RESOURCE_EXHAUSTED": Unavailable,
    "FAILED_PRECONDITION": InvalidArgument,
    "ABORTED": Unavailable,
    "OUT_OF_RANGE": InvalidArgument,
    "UNIMPLEMENTED": Unsupported,
    "INTERNAL": Internal,
    "UNAVAILABLE": ConnectionFailed,
    "DATA_LOSS": ConnectionFailed,
}


def from_message(text: str, fallback: type[ManyloraClientError]) -> ManyloraClientError:
    """Read `[CODE] message` wherever it stands in `text`; without a code, use `fallback`.

    Args:
        text: what the server sent, with or without Triton's words before the code.
        fallback: class of an error that carries no code.
    """
    tagged = _TAG.search(text)
    if tagged:
        return BY_CODE[tagged[1]](tagged[2])
    if _TRITON_CLOSED.search(text):
        return Unsupported("the server does not open this interface to clients")
    if _TRITON_NO_ROOM.search(text):
        # Nearly always a request beyond the server's bound, which is refused however often it is sent.
        return InvalidArgument("the request is too long for the server's request memory; send less at once")
    if _TRITON_NOT_FOUND.search(text):
        return NotFound(text)
    if _TRITON_UNAVAILABLE.search(text):
        return Unavailable(text)
    return fallback(text)


def from_http_status(status: int, text: str) -> ManyloraClientError:
    """The error of an HTTP answer that is not 200."""
    fallback = _BY_STATUS.get(status) or (InvalidArgument if 400 <= status < 500 else Internal)
    return from_message(text or f"HTTP status {status} without a message", fallback)


def from_grpc(code: str, text: str) -> ManyloraClientError:
    """The error of a gRPC call.

    Args:
        code: name of the `grpc.StatusCode`.
        text: the call's details.
    """
    fallback = _BY_GRPC_CODE.get(code, Internal)
    if fallback is Internal and _BROKEN_CALL.search(text):
        fallback = ConnectionFailed
    if fallback is Timeout:
        return Timeout(f"no complete answer within the timeout ({text})")
    return from_message(text or f"gRPC status {code} without a message", fallback)


def from_connection(error: Exception, address: str) -> ManyloraClientError:
    """The error of a socket, or of an answer that is not HTTP.

    Args:
        address: the server's address, for the message.
    """
    # In Python 3.10 asyncio's TimeoutError is not the built-in one.
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return Timeout(f"no answer from {address} within the timeout")
    return ConnectionFailed(f"connection to {address} failed: {str(error) or type(error).__name__}")
