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
    """Gets the replies to one request: some `send`s, the last with `is_last`, or one `fail` at the end.

    All methods are called on the front end's reply thread, which serves every request in flight, so none may
    block: a server with an event loop passes the reply on (`loop.call_soon_threadsafe`) and returns. Whatever
    they raise ends this request alone. A responder whose client reads too slowly bounds what waits for it by
    itself, and reports `is_cancelled` when that is too much.

    Nothing is sent after the last reply but where its sending has failed: then `fail` follows, once or twice,
    and a responder that has ended refuses it.
    """

    request_id: str
    """For messages and the log."""
    is_streaming: bool = True
    """Send whenever there are new tokens; otherwise send the whole answer once, at the end."""

    @abstractmethod
    def send(self, answers: Sequence[Answer], *, is_last: bool) -> None:
        """Send a reply.

        Args:
            answers: what each of the prompts has generated since the reply before, in their order; one
                without news has an empty text and no ids.
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
        """Bring log probabilities into the form that `Answer.logprobs` is to have.

        Called as the tokens come, also for an answer that is sent whole: to format those of a long answer at
        once would keep every other request waiting.

        Args:
            tokenizer: its `name` gives a token's text.

        Returns: one entry for each of the ids.
        """
        return logprobs
