"""The way from a front end back to a client."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from manylora.errors import ManyloraError
from manylora.front_end.answer import Answer
from manylora.front_end.text import Tokenizer
from manylora.messages import TokenLogprobs


class Responder(ABC):
    """Receives the replies to one request: any number of `send`s, ended by one with `is_last` or by a `fail`.

    All methods are called on the front end's reply thread, which serves every request in flight, so none may
    block: a server with an event loop passes the reply on (`loop.call_soon_threadsafe`) and returns. Whatever
    they raise ends this request alone. Nothing limits how much is sent: a responder with a slow client keeps
    count itself, and reports `is_cancelled` when too much waits.

    A fault may make the front end call `fail` although the last reply has been sent. The responder then
    raises or does nothing.
    """

    request_id: str
    """Names the request in messages and in the log."""
    is_streaming: bool = True
    """Send whenever there are new tokens; otherwise send the whole answer once, at the end."""

    @abstractmethod
    def send(self, answers: Sequence[Answer], *, is_last: bool) -> None:
        """Send a reply.

        Args:
            answers: what each of the prompts has generated since the previous reply, in their order; empty
                text and no ids where nothing is new.
        """

    @abstractmethod
    def fail(self, error: ManyloraError) -> None:
        """Send an error, which is the last reply."""

    @abstractmethod
    def is_cancelled(self) -> bool:
        """Whether the client has gone. Called some ten times a second while the request is in flight; the
        request then ends with `fail(CancelledRequestError)` and is freed in the engine."""

    def format_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer
    ) -> Sequence[Any]:
        """Convert log probabilities to the form that `Answer.logprobs` is to have.

        Called as tokens arrive, even for an answer that is sent whole: formatting all of a long answer at
        once would make every other request wait.

        Args:
            tokenizer: its `name` gives a token's text.

        Returns: one entry for each of the ids.
        """
        return logprobs
