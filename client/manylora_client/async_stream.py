"""The answer of a request, chunk by chunk, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from types import TracebackType

from manylora_client.completion import ReplyOrder, collect
from manylora_client.errors import ManyloraClientError
from manylora_client.transport import AsyncReplies
from manylora_client.types import Chunk, Completion


class AsyncStream:
    """An asynchronous iterator of Chunks. The request is sent when the first one is asked for.

    Closing the stream early, dropping it (as a loop left with `break` does) or cancelling the task that waits
    for a chunk cancels the request on the server. One task iterates; `close` may be called from any other of
    the same event loop, and ends the iteration there.
    """

    def __init__(self, send: Callable[[], AsyncReplies]) -> None:
        """Prepare a request; it is not sent yet.

        Args:
            send: sends it, from within the event loop.
        """
        self._send = send
        self._replies: AsyncReplies | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._order = ReplyOrder()
        self._closed = False

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Chunk:
        """Wait for the next chunk.

        Raises:
            ManyloraClientError: the request failed, now or after earlier chunks.
        """
        if self._closed:
            raise StopAsyncIteration
        try:
            if self._replies is None:
                self._loop = asyncio.get_running_loop()
                self._replies = self._send()
            return await self._receive(self._replies)
        except BaseException:
            self._end()
            raise

    async def _receive(self, replies: AsyncReplies) -> Chunk:
        try:
            chunk = await replies.__anext__()
        except StopAsyncIteration:
            if not self._closed:
                self._order.end()
            raise
        except (ManyloraClientError, asyncio.CancelledError) as error:
            # Closed by another task, it may fail in any way.
            if self._closed and not is_task_cancelled():
                raise StopAsyncIteration from error
            raise
        return self._order.check(chunk)

    async def collect(self) -> Completion:
        """Wait for all chunks and join them.

        Raises:
            Cancelled: the stream was closed before its end, or has been read to its end.
            ManyloraClientError: the request failed.
        """
        return collect([chunk async for chunk in self])

    async def close(self) -> None:
        """End the stream. What is still to come is cancelled on the server."""
        self._end()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._closed = True
        if self._replies is not None:
            self._replies.close()

    def __del__(self) -> None:
        if self._replies is None or self._closed or self._loop is None:
            return
        # The last reference may be dropped in another thread, or when the loop has ended.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._replies.close)


def is_task_cancelled() -> bool:
    """Whether a CancelledError is meant for the running task. Python 3.10 cannot tell and says no."""
    if sys.version_info < (3, 11):
        return False
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
