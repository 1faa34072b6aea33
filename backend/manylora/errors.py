"""The errors that users can meet, each with the Triton code that carries it.

`[CODE] message` is the text on every path, since `/generate` and gRPC streams lose the code itself.
"""

from __future__ import annotations

from typing import ClassVar

MAX_SENT_BYTES = 2500
"""Of a message on the wire. gRPC sends it as a header, with up to three bytes for one, and its clients may
drop an answer whose headers exceed 8 KiB: then neither code nor message arrives."""


class ManyloraError(Exception):
    """Base of every error that Manylora raises on purpose. Users may see its message."""

    code: ClassVar[str] = "INTERNAL"

    @property
    def message(self) -> str:
        """What was requested, what was found and what is allowed, without the code."""
        return str(self.args[0]) if self.args else ""

    def tagged(self) -> str:
        """The message as it goes over the wire: `[CODE] message`, always text that can be sent."""
        # It may quote half of a surrogate pair, which JSON can write and which has no UTF-8 form.
        data = f"[{self.code}] {self.message}".encode(errors="backslashreplace")
        if len(data) > MAX_SENT_BYTES:
            data = data[: MAX_SENT_BYTES - 3] + b"..."
        return data.decode(errors="ignore")


class InternalError(ManyloraError):
    """A fault of ours. The log has the traceback; the user gets the request's id."""

    code = "INTERNAL"


class InvalidArgumentError(ManyloraError, ValueError):
    """The request, the configuration or the adapter is wrong as it stands."""

    code = "INVALID_ARG"


class NotFoundError(ManyloraError, LookupError):
    """The named thing does not exist."""

    code = "NOT_FOUND"


class UnsupportedError(ManyloraError):
    """Well-formed, but not served by this build or this model."""

    code = "UNSUPPORTED"


class UnavailableError(ManyloraError):
    """Cannot be served now: the queue is full, the engine is down, the deadline passed. May be retried."""

    code = "UNAVAILABLE"


class CancelledRequestError(ManyloraError):
    """The client went away or cancelled."""

    code = "CANCELLED"


BY_CODE: dict[str, type[ManyloraError]] = {
    error.code: error
    for error in (
        InternalError,
        InvalidArgumentError,
        NotFoundError,
        UnsupportedError,
        UnavailableError,
        CancelledRequestError,
    )
}


def from_code(code: str, message: str) -> ManyloraError:
    """Rebuild an error that crossed a process border. An unknown code becomes INTERNAL."""
    return BY_CODE.get(code, InternalError)(message)
