"""The answer of a request, chunk by chunk."""

from __future__ import annotations

from types import TracebackType

from manylora_client.errors import Cancelled, ConnectionFailed, Internal
from manylora_client.transport import Replies
from manylora_client.types import Chunk, Completion


class Stream:
    """An iterator of Chunks. Closing it early, or dropping it, cancels the request on the server.

    One thread iterates; `close` may be called from any other, and ends the iteration there.
    """

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._finished = False
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
            chunk = self._receive()
        except BaseException:
            self.close()
            raise
        self._finished = bool(chunk.finish_reason)
        return chunk

    def _receive(self) -> Chunk:
        try:
            chunk = next(self._replies)
        except StopIteration:
            if not self._finished:
                raise ConnectionFailed("the stream ended before its last reply") from None
            raise
        except Cancelled as error:
            if self._closed:
                raise StopIteration from error
            raise
        if self._finished:
            raise Internal("the server sent a reply after the last one")
        return chunk

    def collect(self) -> Completion:
        """Wait for all chunks and join them.

        Raises:
            Cancelled: the stream was closed before its end, or has been read to its end.
            ManyloraClientError: the request failed.
        """
        chunks = list(self)
        if not chunks or not chunks[-1].finish_reason:
            raise Cancelled("the stream was closed or read before, so there is no whole answer to collect")
        last = chunks[-1]
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            token_ids=[i for chunk in chunks for i in chunk.token_ids],
            finish_reason=last.finish_reason,
            num_input_tokens=last.num_input_tokens,
            num_output_tokens=last.num_output_tokens,
            adapter_version=last.adapter_version,
        )

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
