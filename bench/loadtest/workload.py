"""What is asked: prompts of random tokens, an adapter and a length for each, all from one seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.loadtest.arrival import Arrival

_SKEW = re.compile(r"even|uniform|zipf:(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens, drawn evenly from `least` to `most`."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read `64` or `32-128`.

        Raises:
            ValueError: it is neither, or not 1 or more.
        """
        first, dash, second = text.partition("-")
        least, most = int(first), int(second if dash else first)
        if not 1 <= least <= most:
            raise ValueError(f"lengths {text!r}: expected N or LEAST-MOST with 1 <= LEAST <= MOST")
        return cls(least, most)

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"

    def draw(self, count: int, seed: Sequence[int]) -> list[int]:
        draws = np.random.default_rng(list(seed)).integers(self.least, self.most, count, endpoint=True)
        return [int(draw) for draw in draws]


def check_skew(text: str) -> str:
    """Return `text` if it names a skew.

    Raises:
        ValueError: it does not.
    """
    if not _SKEW.fullmatch(text):
        raise ValueError(f"skew {text!r}: expected even, uniform or zipf:EXPONENT")
    return text


def choose_adapters(count: int, num_adapters: int, skew: str, seed: int) -> list[int]:
    """Choose an adapter for each request.

    Args:
        count: of requests.
        num_adapters: to choose from, 1 or more.
        skew: `even` (each in turn), `uniform` (each draw alike) or `zipf:S` (adapter k drawn in proportion to
            1 / (k + 1)^S).

    Returns:
        Indices below `num_adapters`.
    """
    match = _SKEW.fullmatch(check_skew(skew))
    if skew == "even":
        return [i % num_adapters for i in range(count)]
    exponent = float(match[1]) if match and match[1] else 0.0
    weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -exponent
    draws = np.random.default_rng([seed, 3]).choice(num_adapters, count, p=weights / weights.sum())
    return [int(draw) for draw in draws]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate, greedily and to its full length."""

    prompt: list[int]
    adapter: str
    """Empty: the base model."""
    num_output: int
    """Tokens to generate; an end of sequence before is forbidden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What all cases of a run have in common."""

    num_requests: int
    prompt_tokens: Lengths
    output_tokens: Lengths
    skew: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One workload with its arrival process."""

    requests: list[Request]
    arrival: Arrival
    num_adapters: int
    """0: the base model only."""
    seed: int

    @property
    def mix(self) -> str:
        return "mixed" if self.num_adapters else "base"

    @property
    def label(self) -> str:
        """For the progress bar."""
        return f"{self.num_adapters} adapters, {self.arrival.label}" if self.num_adapters else "base"

    def due_times(self) -> list[float]:
        """See `Arrival.due_times`."""
        return self.arrival.due_times(len(self.requests), self.seed)


def make_requests(shape: Shape, adapters: Sequence[str], vocab_size: int) -> list[Request]:
    """Draw the requests. Prompts and lengths depend on the shape alone, so cases differ in adapters only.

    Args:
        adapters: names to choose from; none: all requests go to the base model.
        vocab_size: ids are drawn below it, and above the first ones, where special tokens tend to be.
    """
    count, seed = shape.num_requests, shape.seed
    prompt_lengths = shape.prompt_tokens.draw(count, [seed, 0])
    output_lengths = shape.output_tokens.draw(count, [seed, 1])
    draw = np.random.default_rng([seed, 4])
    lowest = min(100, vocab_size // 4)
    prompts = [draw.integers(lowest, vocab_size, length).tolist() for length in prompt_lengths]
    names = [""] * count
    if adapters:
        names = [adapters[i] for i in choose_adapters(count, len(adapters), shape.skew, seed)]
    return [
        Request(prompt=prompt, adapter=name, num_output=length)
        for prompt, name, length in zip(prompts, names, output_lengths, strict=True)
    ]
