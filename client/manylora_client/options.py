"""What a request may ask for besides its prompt, by keyword."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class Options(TypedDict, total=False):
    """Request parameters, as keywords of `generate`, `stream` and `chat`.

    What is left out or None is not sent, and the server's default applies. A keyword that is not named here
    is sent as it is, for the server to judge; lists and mappings travel as JSON text.
    """

    adapter_id: str | None
    """The adapter; empty is the base model."""
    adapter_scale: float | None
    """Multiplies the adapter's own scaling, for this request."""

    max_tokens: int | None
    """Most tokens to generate."""
    min_tokens: int | None
    """The answer does not end before it has as many tokens."""
    stop: str | Sequence[str] | None
    """Text, or texts, before which the answer ends. A special token is named by its text."""
    stop_token_ids: Sequence[int] | None
    """Tokens with which the answer ends, besides the model's end tokens."""
    ignore_eos: bool | None
    """Go on after one of the model's end tokens, up to `max_tokens`."""
    add_special_tokens: bool | None
    """False: the prompt's text is tokenised as it is, without BOS in front. A chat never gets more than its
    template writes."""

    temperature: float | None
    """0 is greedy."""
    top_p: float | None
    """Sample among the likeliest tokens whose probabilities reach this sum."""
    top_k: int | None
    """Sample among this many of the likeliest tokens; 0 is all."""
    min_p: float | None
    """Sample among tokens that are at least this share as likely as the likeliest."""
    seed: int | None
    """Makes sampling repeatable."""
    repetition_penalty: float | None
    """Above 1: tokens of the prompt and the answer so far become less likely."""
    presence_penalty: float | None
    """Above 0: tokens that the answer holds already become less likely."""
    frequency_penalty: float | None
    """Above 0: tokens become less likely by how often the answer holds them already."""

    logprobs: int | None
    """Alternatives to report for each token; the answer's `logprobs` holds them. 0: no log probabilities."""
    echo: bool | None
    """The answer's text begins with the prompt."""

    deadline_ms: int | None
    """The server answers within so many milliseconds or with Unavailable. `timeout` bounds the client's
    waiting; this frees the server as well, where Triton does not tell it that the client has gone."""
    request_priority: int | None
    """Higher runs earlier."""
