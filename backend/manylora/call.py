"""One request in flight in a front end: its sequences, and where its replies go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from manylora.errors import ManyloraError
from manylora.messages import Tokens
from manylora.protocol import Answer, Tensors
from manylora.text_stream import TextStream


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
    num_input_tokens: int
    stream: TextStream
    new_text: list[str] = field(default_factory=list)
    """For the next reply; begins with the prompt where it is echoed."""
    new_ids: list[int] = field(default_factory=list)
    """For the next reply."""
    finish_reason: str = ""
    adapter_version: str = ""

    def take(self, tokens: Tokens) -> None:
        """Add new tokens, up to the end of a stop string."""
        self.adapter_version = tokens.adapter_version
        text, num_taken = self.stream.add(tokens.token_ids)
        self.new_text.append(text)
        self.new_ids += tokens.token_ids[:num_taken]
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif tokens.finish_reason:
            self.new_text.append(self.stream.finish())
            # What was held back can, at the very end, still complete a stop string.
            self.finish_reason = "stop" if self.stream.stopped else tokens.finish_reason

    def answer(self) -> Answer:
        """What has come since the last answer."""
        answer = Answer(
            text="".join(self.new_text),
            token_ids=self.new_ids,
            finish_reason=self.finish_reason,
            num_input_tokens=self.num_input_tokens,
            num_output_tokens=self.stream.num_tokens,
            adapter_version=self.adapter_version,
        )
        self.new_text, self.new_ids = [], []
        return answer


@dataclass(eq=False, slots=True)
class Call:
    """One request: N sequences and one responder."""

    responder: Responder
    rows: list[Row]

    @property
    def has_finished(self) -> bool:
        return all(row.finish_reason for row in self.rows)
