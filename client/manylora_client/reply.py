"""A reply of the server, read from its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from manylora_client.errors import Internal
from manylora_client.types import Chunk, TokenLogprob


def decode(output: Callable[[str], Any]) -> Chunk:
    """Turn a reply's tensors into a Chunk.

    Args:
        output: the tensor of that name as a numpy array, or None.

    Raises:
        Internal: an output is missing or of the wrong kind.
    """

    def array(name: str) -> Any:
        found = output(name)
        if found is None:
            raise Internal(f"the server's reply lacks the output {name!r}")
        return np.asarray(found).reshape(-1)

    def text(name: str) -> str:
        value = array(name)[0]
        return value.decode() if isinstance(value, bytes) else str(value)

    try:
        return Chunk(
            text=text("text_output"),
            token_ids=[int(i) for i in array("output_ids")],
            finish_reason=text("finish_reason"),
            num_input_tokens=int(array("num_input_tokens")[0]),
            num_output_tokens=int(array("num_output_tokens")[0]),
            adapter_version=text("adapter_version"),
            logprobs=_logprobs(text("logprobs")),
        )
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise Internal(f"the server's reply cannot be read: {error!r}") from error


def _logprobs(text: str) -> list[TokenLogprob] | None:
    if not text:
        return None
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise ValueError(f"logprobs holds no list but {text[:200]!r}")
    return [_token(entry, [_token(other, []) for other in entry["top"]]) for entry in entries]


def _token(entry: Any, top: list[TokenLogprob]) -> TokenLogprob:
    return TokenLogprob(
        id=int(entry["id"]), text=str(entry["text"]), logprob=float(entry["logprob"]), top=top
    )
