"""The seam between the clients and a protocol: what HTTP and gRPC each have to do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from manylora_client.errors import InvalidArgument, Timeout
from manylora_client.request import Request
from manylora_client.types import Chunk


class Replies(Protocol):
    """The replies of one stream, as they arrive. Used by one thread, except for `close`."""

    def __next__(self) -> Chunk:
        """Wait for the next reply.

        Raises:
            StopIteration: the final reply has been returned.
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


class AsyncReplies(Protocol):
    """The replies of one stream, as they arrive. Used by one task, except for `close`."""

    async def __anext__(self) -> Chunk:
        """Wait for the next reply.

        Raises:
            StopAsyncIteration: the final reply has been returned.
            ManyloraClientError: the request or the connection failed.
            asyncio.CancelledError: the task was cancelled, or `close` was called, which may raise the others
                as well.
        """

    def close(self) -> None:
        """Cancel what is still to come. May be called from any task and any number of times."""


class AsyncTransport(Protocol):
    """One server, reached by one protocol from one event loop.

    `close` lets calls in flight fail, some of them with asyncio.CancelledError.
    """

    async def infer(self, model: str, request: Request, deadline: Deadline) -> Chunk:
        """Send a request and wait for its only reply. Cancelled, it cancels the request."""

    def stream(self, model: str, request: Request, deadline: Deadline) -> AsyncReplies:
        """Begin to send a request and return its replies to come."""

    async def is_ready(self, models: Sequence[str], deadline: Deadline) -> bool:
        """Ask whether the server and each of `models` are ready."""

    async def close(self) -> None:
        """Give back all connections."""


class Deadline:
    """The moment when a call has taken too long."""

    def __init__(self, timeout_s: float | None) -> None:
        """Start the clock.

        Args:
            timeout_s: seconds from now, above 0; None: no limit.

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
