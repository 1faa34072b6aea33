"""What a soak asks: a seeded mix of requests. An operation depends on the seed and its index alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_TOKENS = 12
PROMPTS = (
    "The sea is",
    "Once upon a time there was a small dragon who",
    "def fibonacci(n):",
    "The three most important things in life are",
    "Recipe for bread: take flour, water,",
    "Dear diary, today",
)
KINDS = {
    "greedy": 50,
    "sampled": 16,
    "streamed away": 8,
    "timed out": 4,
    "with a deadline": 8,
    "invalid": 7,
    "unknown adapter": 7,
}
"""Kinds of operations and how often each comes."""
_INVALID: tuple[dict[str, Any], ...] = (
    {"max_tokens": 0},
    {"max_tokens": 3.5},
    {"temperature": -1.0},
    {"top_p": 1.5},
    {"seed": -3},
    {"no_such_parameter": 1},
    {"adapter_id": "../escape"},
    {"adapter_id": "a" * 300},
    {"min_tokens": 100},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One request."""

    index: int
    kind: str
    adapter_id: str
    prompt: str
    max_tokens: int
    protocol: Literal["http", "grpc"]
    is_stream: bool
    parameters: Mapping[str, Any] = field(default_factory=dict)
    leave_after: int = 0
    """Of `streamed away`: chunks that are read."""
    timeout_s: float | None = None
    """Of `timed out`: when the client loses its patience."""


class Plan:
    """Makes operations over some adapters, the first of which are asked for most."""

    def __init__(self, seed: int, adapter_ids: Sequence[str], num_prompts: int, skew: float = 1.0) -> None:
        """
        Args:
            num_prompts: prompts asked of each adapter.
            skew: exponent of the Zipf distribution over `adapter_ids`.
        """
        self._seed = seed
        self._adapter_ids = list(adapter_ids)
        self._weights = [1 / rank**skew for rank in range(1, len(adapter_ids) + 1)]
        self._num_prompts = num_prompts

    def prompts_of(self, adapter_id: str) -> list[str]:
        """The prompts that an adapter is asked, all with known answers."""
        first = self._adapter_ids.index(adapter_id)
        return [PROMPTS[(first + number) % len(PROMPTS)] for number in range(self._num_prompts)]

    def operation(self, index: int) -> Operation:
        """Operation number `index`."""
        draw = random.Random(f"{self._seed}:{index}")
        (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
        (adapter_id,) = draw.choices(self._adapter_ids, self._weights)
        prompt = draw.choice(self.prompts_of(adapter_id))
        max_tokens, parameters = draw.randint(1, MAX_TOKENS), dict[str, Any]()
        is_stream, protocol = draw.random() < 0.5, draw.choice(("http", "grpc"))
        leave_after, timeout_s = 0, None
        if kind == "sampled":
            # Few of them, so that each is asked again and again.
            max_tokens = 6
            parameters = {"temperature": 0.9, "top_p": 0.9, "seed": draw.randrange(2)}
        elif kind == "streamed away":
            is_stream, max_tokens, leave_after = True, 40, draw.choice((0, 1, 1, 2, 4))
        elif kind == "timed out":
            max_tokens, timeout_s = 40, draw.choice((0.005, 0.05, 0.2))
        elif kind == "with a deadline":
            parameters = {"deadline_ms": draw.choice((1, 20, 100, 500, 120_000))}
        elif kind == "invalid":
            parameters = dict(draw.choice(_INVALID))
            adapter_id = parameters.pop("adapter_id", adapter_id)
            max_tokens = parameters.pop("max_tokens", max_tokens)
        elif kind == "unknown adapter":
            adapter_id = f"nobody-{draw.randrange(1000)}"
        return Operation(
            index=index,
            kind=kind,
            adapter_id=adapter_id,
            prompt=prompt,
            max_tokens=max_tokens,
            protocol=protocol,
            is_stream=is_stream,
            parameters=parameters,
            leave_after=leave_after,
            timeout_s=timeout_s,
        )
