"""The output `logprobs`: log probabilities as JSON, one object for each generated id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from manylora.front_end.text import Tokenizer
from manylora.messages import TokenLogprobs

LEAST_LOGPROB = -1e9
"""Stands for minus infinity, which JSON has no form for: a token that the model rules out."""


def logprobs_json(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> str:
    """Format the log probabilities of some ids.

    Returns:
        `[{"id": 12, "text": " the", "logprob": -0.5, "top": [{"id": 12, "text": " the", "logprob": -0.5}]}]`
        with `text` from `Tokenizer.name`.

    Raises:
        ValueError: there are not as many log probabilities as ids.
    """
    return join_entries(entries_json(token_ids, logprobs, tokenizer))


def entries_json(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> list[str]:
    """The objects one by one, each as JSON, so that they can be written while an answer grows: all of a long
    answer at once would stop every other thread for seconds."""
    return [
        json.dumps(
            {
                **_entry(token_id, logprob.logprob, tokenizer),
                "top": [_entry(other_id, value, tokenizer) for other_id, value in logprob.top],
            },
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
        for token_id, logprob in zip(token_ids, logprobs, strict=True)
    ]


def join_entries(entries: Sequence[str]) -> str:
    """The JSON list of the objects that `entries_json` has written."""
    return f"[{','.join(entries)}]"


def _entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"id": token_id, "text": tokenizer.name(token_id), "logprob": max(LEAST_LOGPROB, logprob)}
