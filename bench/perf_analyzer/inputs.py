"""What perf_analyzer sends: prompts of known words, each for an adapter of a mix, in the form of each way."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TEXT = (
    "the of and to in is was for that on with as it at by from his an were are which this be had also but not"
    " have first one their after two who they new has when been all more time over into only some there other"
)
WORDS = _TEXT.split()
"""One token each, with the blank before it, in the vocabularies of most models."""
MIN_WORDS = 4
"""Enough for a prompt of its own for each of some million requests."""
BASE_MODEL = "@base"
"""Stands for the base model where a name of an adapter is expected. No adapter may have this name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One request."""

    prompt: str
    """Unlike any other's, so that no request profits from the cached prefix of another."""
    adapter_id: str
    """Empty for the base model."""


def share_out(num_requests: int, num_adapters: int, skew: float) -> list[int]:
    """Divide requests among adapters: the k-th gets a share in proportion to 1 / k^skew.

    Args:
        skew: 0 is uniform, 1 is Zipf's law.

    Returns: `num_adapters` counts that sum up to `num_requests`, the highest first.
    """
    weights = [1 / k**skew for k in range(1, num_adapters + 1)]
    exact = [num_requests * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(num_adapters), key=lambda k: counts[k] - exact[k])
    for k in by_rest[: num_requests - sum(counts)]:
        counts[k] += 1
    return counts


def make_entries(
    adapter_ids: Sequence[str], *, num_requests: int, num_words: int, skew: float, seed: int
) -> list[Entry]:
    """Make one entry for each request, in random order.

    Args:
        num_words: of each prompt, at least `MIN_WORDS`.
        skew: see `share_out`; the first adapter is the most popular one.
    """
    draw = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < num_requests:
        prompts[" ".join(draw.choices(WORDS, k=num_words))] = None
    counts = share_out(num_requests, len(adapter_ids), skew)
    mix = [name for name, count in zip(adapter_ids, counts, strict=True) for _ in range(count)]
    draw.shuffle(mix)
    return [Entry(prompt=prompt, adapter_id=name) for prompt, name in zip(prompts, mix, strict=True)]


def text_only(entries: Sequence[Entry]) -> str:
    """perf_analyzer's input file where all else goes the same way for every request."""
    return _data([{"text_input": [entry.prompt]} for entry in entries])


def with_tensor(entries: Sequence[Entry], parameters: Mapping[str, Any]) -> str:
    """Its input file where each request's parameters are a tensor."""
    return _data(
        [
            {
                "text_input": [entry.prompt],
                "sampling_parameters": [json.dumps({**parameters, "adapter_id": entry.adapter_id})],
            }
            for entry in entries
        ]
    )


def with_body(entries: Sequence[Entry], parameters: Mapping[str, Any]) -> str:
    """Its input file where each entry is the body of a POST to a generate endpoint."""
    bodies = [{"text_input": entry.prompt, **parameters, "adapter_id": entry.adapter_id} for entry in entries]
    return _data([{"payload": [body]} for body in bodies])


def _data(entries: list[dict[str, Any]]) -> str:
    return json.dumps({"data": entries}, indent=1)
