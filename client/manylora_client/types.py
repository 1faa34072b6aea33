"""What the client returns, and what it takes besides plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import numpy.typing as npt


class TextPart(TypedDict):
    """One part of a content, as OpenAI's clients write it: `type` is `text`."""

    type: str
    text: str


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str | Sequence[TextPart]
    """Parts are joined, with nothing in between."""


Messages = str | Sequence[Message]
"""A single user message, or the turns so far."""

TokenIds = Sequence[int] | npt.NDArray[np.integer]
"""A prompt as token ids: one dimension, int32 range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """How likely a token is to the model, whatever the sampling parameters say."""

    id: int
    text: str
    logprob: float
    """Natural logarithm of the probability; -1e9 stands for minus infinity."""
    top: list[TokenLogprob] = field(default_factory=list)
    """Of a generated token: the likeliest ones in its place, best first, themselves without `top`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One reply of a stream: what is new, and the totals so far."""

    text: str
    """The new text. Joined, the texts of a stream are the text of the same request without streaming."""
    token_ids: list[int]
    """The new ids."""
    finish_reason: str
    """`stop` or `length` in the last chunk, empty before."""
    num_input_tokens: int
    num_output_tokens: int
    adapter_version: str
    """Content hash of the adapter that answers; empty for the base model."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `token_ids`; None where none were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One whole answer."""

    text: str
    token_ids: list[int]
    """The generated ids, the one that ended the sequence among them."""
    finish_reason: str
    """`stop` or `length`."""
    num_input_tokens: int
    num_output_tokens: int
    adapter_version: str
    """Content hash of the adapter that answered; empty for the base model."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `token_ids`; None where none were asked for."""
