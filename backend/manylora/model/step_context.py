"""What the layers of a model look up of the step that runs.

Shape key: T tokens of a step, H query heads, V key/value heads, D key size, E value size.

The model's code is transformers' own and hands nothing through. So each model has one `StepContext`, which
every site and every attention module of it refers to, and which the runner fills around each step. Compiled
code refers to it by number (`operators.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from manylora_kernels import Mix
from manylora_kernels.attention.plan import Scoring

from manylora.model import operators


@dataclass(slots=True, kw_only=True)
class LayerCache:
    """Keys and values of one layer: [blocks * M, V * D] each, row = block * M + offset."""

    keys: torch.Tensor
    values: torch.Tensor
    num_heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's call of its attention."""

    layer: int
    """transformers' layer_idx."""
    query: torch.Tensor
    """[H, T, D], rotary embedding applied."""
    key: torch.Tensor
    """[V, T, D], likewise."""
    value: torch.Tensor
    """[V, T, E]"""
    scoring: Scoring


class AttentionPlan(Protocol):
    """What the attention of one step does, the same in every layer."""

    def attend(self, call: AttentionCall, caches: Mapping[int, LayerCache]) -> torch.Tensor:
        """Write the step's keys and values into the layer's cache, then attend: [T, H, E]."""


class StepContext:
    """The running step of one model, where its layers find it."""

    def __init__(self) -> None:
        self.number = operators.register(self)
        self.caches: dict[int, LayerCache] = {}
        """By layer_idx. The runner makes them once, for all steps."""
        self.attention: AttentionPlan | None = None
        """Of the step; None between steps."""
        self.mix: Mix | None = None
        """The step's adapters; None where no row has one, and between steps."""

    @contextmanager
    def during(self, attention: AttentionPlan, mix: Mix | None = None) -> Iterator[None]:
        """Within it the model runs one step."""
        self.attention, self.mix = attention, mix
        try:
            yield
        finally:
            self.attention = self.mix = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scoring: Scoring
    ) -> torch.Tensor:
        """One layer's attention of the step: [1, H, T, D], [1, V, T, D], [1, V, T, E] -> [1, T, H, E]."""
        assert self.attention is not None, "the model is called outside of a step"
        call = AttentionCall(layer, query[0], key[0], value[0], scoring)
        return self.attention.attend(call, self.caches)[None]
