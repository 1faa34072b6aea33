"""The answer of a request, chunk by chunk."""

from __future__ import annotations

from types import TracebackType

from manylora_client.completion import ReplyOrder, collect
from manylora_client.errors import Cancelled
from manylora_client.transport import Replies
from manylora_client.types import Chunk, Completion


class Stream:
    """An iterator of Chunks. Closing it early, or dropping it, cancels the request on the server.

    One thread iterates; `close` may be called from any other, and ends the iteration there.
    """

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._order = ReplyOrder()
        self._closed = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        """Wait for the next chunk.

        Raises:
            ManyloraClientError: the request failed, now or after earlier chunks.
        """
        if self._closed:
            raise StopIteration
        try:
            return self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> Chunk:
        try:
            chunk = next(self._replies)
        except StopIteration:
            self._order.end()
            raise
        except Cancelled as error:
            if self._closed:
                raise StopIteration from error
            raise
        return self._order.check(chunk)

    def collect(self) -> Completion:
        """Wait for all chunks and join them.

        Raises:
            Cancelled: the stream was closed before its end, or has been read to its end.
            ManyloraClientError: the request failed.
        """
        return collect(list(self))

    def close(self) -> None:
        """End the stream. What is still to come is cancelled on the server."""
        self._closed = True
        self._replies.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop left with `break` drops its stream without closing it.
        self.close()
