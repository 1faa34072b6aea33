"""What a sequence has generated: while it grows, and as it is handed out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from manylora.front_end.prompt import Prompt
from manylora.front_end.text import Tokenizer
from manylora.front_end.text_stream import TextStream
from manylora.messages import TokenLogprobs, Tokens

FormatLogprobs = Callable[[Sequence[int], Sequence[TokenLogprobs]], Sequence[Any]]
"""Makes one entry for each of the ids, in the form that `Answer.logprobs` is to have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one sequence has generated since its last answer."""

    text: str
    """Ends neither within a character nor within what may become a stop string."""
    token_ids: Sequence[int]
    finish_reason: str
    """`stop` or `length` in the last answer, empty before."""
    num_input_tokens: int
    num_output_tokens: int
    """In all answers so far, this one included."""
    adapter_version: str
    """Content hash of the adapter; empty for the base model."""
    logprobs: Sequence[Any] | None = None
    """One for each of `token_ids`, in the responder's format; None unless the prompt requests them."""


@dataclass(eq=False, kw_only=True, slots=True)
class GrowingAnswer:
    """One sequence from its request to its end, and what it has generated that is not handed out yet."""

    id: int
    """The sequence's id in messages to and from the engine."""
    stream: TextStream
    num_input_tokens: int = 0
    """Set when the prompt has been tokenised."""
    format_logprobs: FormatLogprobs | None = None
    """None unless the prompt requests log probabilities."""
    deadline_ms: int = 0
    """As the user gave it, for messages; 0: no deadline."""
    deadline_s: float = math.inf
    """When it passes, on the monotonic clock."""
    finish_reason: str = ""
    adapter_version: str = ""
    _texts: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _logprobs: list[Any] = field(default_factory=list)

    def echo(self, prompt: str) -> None:
        """Begin the answer's text with the prompt."""
        self._texts.append(prompt)

    def add(self, tokens: Tokens) -> None:
        """Add new tokens, up to the end of a stop string."""
        self.adapter_version = tokens.adapter_version
        text, num_added = self.stream.add(tokens.token_ids)
        self._texts.append(text)
        self._token_ids += tokens.token_ids[:num_added]
        if self.format_logprobs is not None:
            self._logprobs += self.format_logprobs(tokens.token_ids[:num_added], tokens.logprobs[:num_added])
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif tokens.finish_reason:
            self._texts.append(self.stream.finish())
            # What was held back can, at the very end, still complete a stop string.
            self.finish_reason = "stop" if self.stream.stopped else tokens.finish_reason

    def drain(self) -> Answer:
        """What has been generated since the last call."""
        answer = Answer(
            text="".join(self._texts),
            token_ids=self._token_ids,
            finish_reason=self.finish_reason,
            num_input_tokens=self.num_input_tokens,
            num_output_tokens=self.stream.num_tokens,
            adapter_version=self.adapter_version,
            logprobs=self._logprobs if self.format_logprobs is not None else None,
        )
        self._texts, self._token_ids, self._logprobs = [], [], []
        return answer


def new_answer(
    sequence_id: int,
    prompt: Prompt,
    tokenizer: Tokenizer,
    arrived_s: float,
    format_logprobs: FormatLogprobs,
) -> GrowingAnswer:
    """Begin the answer to a prompt.

    Args:
        arrived_s: from which its deadline counts, on the monotonic clock.
    """
    return GrowingAnswer(
        id=sequence_id,
        stream=TextStream(
            tokenizer, stop=prompt.stop, min_tokens=prompt.params.min_tokens, continues=prompt.echo
        ),
        format_logprobs=format_logprobs if prompt.params.logprobs else None,
        deadline_ms=prompt.deadline_ms,
        deadline_s=arrived_s + prompt.deadline_ms / 1000 if prompt.deadline_ms else math.inf,
    )
