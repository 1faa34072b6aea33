"""One hostile request as it goes over the wire, and what came back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Expectation = Literal["answer", "refusal", "either"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCall:
    """A request of well-formed HTTP; its body may be anything."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    is_stream: bool = False
    """Its answer is server-sent events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpBytes:
    """Bytes on an HTTP port that need be no request at all."""

    sent: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcCall:
    """Serialised ModelInferRequests: one for ModelInfer, any number on a ModelStreamInfer."""

    messages: tuple[bytes, ...]
    is_stream: bool = False
    is_marked: bool = True
    """On a stream: each message has an id of its own and asks for its final flag."""


Wire = HttpCall | HttpBytes | GrpcCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A sequence whose right answer is known."""

    place: int
    """In the list of known answers."""
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one request must be answered with."""

    expects: Expectation = "either"
    known: tuple[Known, ...] = ()
    """For an answer: one for each sequence of the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One case of the grammar: a request, or a few on one stream."""

    index: int
    kind: str
    """The grammar's production."""
    wire: Wire
    asked: tuple[Asked, ...] = (Asked(),)
    """For each request, in the order sent."""
    cancel_after: int | None = None
    """Replies to read before the client goes away; 0 is at once, None is never."""


@dataclass(slots=True, kw_only=True)
class Reply:
    """One answer to one request: tensors by name, or an error."""

    outputs: dict[str, tuple[str, list[int], list[Any]]] = field(default_factory=dict)
    """Name -> Triton's data type, shape, flat values; strings as bytes."""
    error: str | None = None
    status: str = ""
    """HTTP status or gRPC code; empty where the protocol tells none."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """All that a client met."""

    replies: dict[str, list[Reply]] = field(default_factory=dict)
    """By request id; "" where the protocol has one request only."""
    num_final: dict[str, int] = field(default_factory=dict)
    """Final replies by request id."""
    end: Literal["answered", "closed", "cancelled", "timed out"] = "answered"
    """closed: the server ended the connection without a whole answer. cancelled: the client went away."""
    fault: str = ""
    """What broke the protocol itself, such as bytes behind the answer."""

    def add(self, request_id: str, reply: Reply | None, *, is_final: bool) -> None:
        """Note a reply; None is a final flag alone."""
        replies = self.replies.setdefault(request_id, [])
        if reply is not None:
            replies.append(reply)
        self.num_final[request_id] = self.num_final.get(request_id, 0) + is_final
