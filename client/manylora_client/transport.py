"""The seam between the client and a protocol: what HTTP and gRPC each have to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from manylora_client.errors import Internal, InvalidArgument, Timeout
from manylora_client.request import Request
from manylora_client.types import Chunk


class Replies(Protocol):
    """The replies of one stream, as they arrive. Used by one thread, except for `close`."""

    def __next__(self) -> Chunk:
        """Wait for the next reply.

        Raises:
            StopIteration: the final reply has been taken.
            Cancelled: `close` was called.
            ManyloraClientError: the request or the connection failed.
        """

    def close(self) -> None:
        """Cancel what is still to come. May be called from any thread and any number of times."""


class Transport(Protocol):
    """One server, reached by one protocol. All methods may be called from several threads at once."""

    def infer(self, model: str, request: Request, deadline: Deadline) -> Chunk:
        """Send a request and wait for its only reply."""

    def stream(self, model: str, request: Request, deadline: Deadline) -> Replies:
        """Send a request and return its replies to come."""

    def is_ready(self, models: Sequence[str], deadline: Deadline) -> bool:
        """Ask whether the server and each of `models` are ready."""

    def close(self) -> None:
        """Give back all connections."""


class Deadline:
    """The moment when a call has taken too long."""

    def __init__(self, timeout_s: float | None) -> None:
        """Start the clock.

        Args:
            timeout_s: seconds from now, above 0; None is no bound.

        Raises:
            InvalidArgument: `timeout_s` is not above 0.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise InvalidArgument(f"timeout={timeout_s}: must be above 0 seconds, or None for no bound")
        self._timeout_s = timeout_s
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self) -> float | None:
        """Seconds left, above 0; None if there is no bound.

        Raises:
            Timeout: the moment has passed.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise Timeout(f"no complete answer within timeout={self._timeout_s} seconds")
        return left


def decode(output: Callable[[str], Any]) -> Chunk:
    """Turn a reply's tensors into a Chunk.

    Args:
        output: the tensor of that name as a numpy array, or None.

    Raises:
        Internal: an output is missing or of the wrong kind.
    """

    def array(name: str) -> Any:
        found = output(name)
        if found is None:
            raise Internal(f"the server's reply lacks the output {name!r}")
        return np.asarray(found).reshape(-1)

    def text(name: str) -> str:
        value = array(name)[0]
        return value.decode() if isinstance(value, bytes) else str(value)

    try:
        return Chunk(
            text=text("text_output"),
            token_ids=[int(i) for i in array("output_ids")],
            finish_reason=text("finish_reason"),
            num_input_tokens=int(array("num_input_tokens")[0]),
            num_output_tokens=int(array("num_output_tokens")[0]),
            adapter_version=text("adapter_version"),
        )
    except (ValueError, IndexError, TypeError) as error:
        raise Internal(f"the server's reply cannot be read: {error}") from error
