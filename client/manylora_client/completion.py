"""Whole answers out of replies."""

from __future__ import annotations

from collections.abc import Sequence

from manylora_client.errors import Cancelled, ConnectionFailed, Internal
from manylora_client.types import Chunk, Completion


def collect(chunks: Sequence[Chunk]) -> Completion:
    """Join the chunks that were left of a stream.

    Raises:
        Cancelled: it does not end with the stream's last chunk.
    """
    if not chunks or not chunks[-1].finish_reason:
        raise Cancelled("the stream was closed or read before, so there is no whole answer to collect")
    return join(chunks)


def join(chunks: Sequence[Chunk]) -> Completion:
    """Join the chunks of one answer, one at least."""
    last = chunks[-1]
    logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        token_ids=[i for chunk in chunks for i in chunk.token_ids],
        finish_reason=last.finish_reason,
        num_input_tokens=last.num_input_tokens,
        num_output_tokens=last.num_output_tokens,
        adapter_version=last.adapter_version,
        logprobs=[token for tokens in logprobs for token in tokens] if logprobs else None,
    )


class ReplyOrder:
    """Checks that the replies of a stream make one answer: the last one says so, and none follows it."""

    def __init__(self) -> None:
        self._is_finished = False

    def check(self, chunk: Chunk) -> Chunk:
        """Return the next reply.

        Raises:
            Internal: the last one has come already.
        """
        if self._is_finished:
            raise Internal("the server sent a reply after the last one")
        self._is_finished = bool(chunk.finish_reason)
        return chunk

    def end(self) -> None:
        """No reply follows.

        Raises:
            ConnectionFailed: the last one has not come.
        """
        if not self._is_finished:
            raise ConnectionFailed("the stream ended before its last reply")
