"""One request in flight in a front end: its sequences, and where its replies go."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from manylora.errors import ManyloraError
from manylora.front_end.logprobs_json import entries_json, join_entries
from manylora.front_end.protocol import Answer, Tensors
from manylora.front_end.text import Tokenizer
from manylora.front_end.text_stream import TextStream
from manylora.messages import Tokens


class Responder(Protocol):
    """The way back to the client. After a last reply nothing more may be sent."""

    @property
    def request_id(self) -> str:
        """For messages and the log."""

    def send(self, outputs: Tensors, *, is_last: bool) -> None:
        """Send a reply with data."""

    def fail(self, error: ManyloraError) -> None:
        """Send an error, which is the last reply."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""


@dataclass(eq=False, kw_only=True, slots=True)
class Row:
    """One sequence of a request."""

    id: int
    """The engine's name for it."""
    stream: TextStream
    num_input_tokens: int = 0
    """Filled when the prompt has been tokenised."""
    logprobs_tokenizer: Tokenizer | None = None
    """Names the tokens where log probabilities are asked for, else None."""
    deadline_ms: int = 0
    """What the user allowed, for the message; 0: no deadline."""
    deadline_s: float = math.inf
    """When it passes, on the monotonic clock."""
    new_text: list[str] = field(default_factory=list)
    """For the next reply; begins with the prompt where it is echoed."""
    new_ids: list[int] = field(default_factory=list)
    """For the next reply."""
    new_logprobs: list[str] = field(default_factory=list)
    """One for each of `new_ids` where they are asked for, as JSON."""
    finish_reason: str = ""
    adapter_version: str = ""

    def take(self, tokens: Tokens) -> None:
        """Add new tokens, up to the end of a stop string."""
        self.adapter_version = tokens.adapter_version
        text, num_taken = self.stream.add(tokens.token_ids)
        self.new_text.append(text)
        self.new_ids += tokens.token_ids[:num_taken]
        if self.logprobs_tokenizer is not None:
            self.new_logprobs += entries_json(
                tokens.token_ids[:num_taken], tokens.logprobs[:num_taken], self.logprobs_tokenizer
            )
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif tokens.finish_reason:
            self.new_text.append(self.stream.finish())
            # What was held back can, at the very end, still complete a stop string.
            self.finish_reason = "stop" if self.stream.stopped else tokens.finish_reason

    def answer(self) -> Answer:
        """What has come since the last answer."""
        logprobs = join_entries(self.new_logprobs) if self.logprobs_tokenizer is not None else ""
        answer = Answer(
            text="".join(self.new_text),
            token_ids=self.new_ids,
            finish_reason=self.finish_reason,
            num_input_tokens=self.num_input_tokens,
            num_output_tokens=self.stream.num_tokens,
            adapter_version=self.adapter_version,
            logprobs=logprobs,
        )
        self.new_text, self.new_ids, self.new_logprobs = [], [], []
        return answer


@dataclass(eq=False, slots=True)
class Call:
    """One request: N sequences and one responder."""

    responder: Responder
    rows: list[Row]
    has_ended: bool = False
    """Failed: it has had its last reply, or has it now. Set by the reply loop, for whoever starts its
    sequences."""

    @property
    def has_finished(self) -> bool:
        return all(row.finish_reason for row in self.rows)

    @property
    def next_deadline(self) -> Row | None:
        """The row that runs out of time first, of those that have not finished and have a deadline."""
        timed = [row for row in self.rows if not row.finish_reason and row.deadline_s < math.inf]
        return min(timed, key=lambda row: row.deadline_s, default=None)
