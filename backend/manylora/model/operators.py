"""The sites and the attention as operators of torch, which a compiler leaves as they are.

Shape key: T tokens of a step, H query heads, V key/value heads, D key size, E value size, K inputs,
N outputs.

An operator takes tensors and numbers only. What it works on besides, a site with its pool or the running
step, it looks up under a number that `register` gave. The attention's writes to the caches are not
declared: its result is always used, so it is never dropped, and each layer depends on the one before, so
none are reordered; compiled code touches no cache otherwise.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from manylora_kernels.attention.plan import Scoring


class _Site(Protocol):
    def linear(self, x: torch.Tensor) -> torch.Tensor: ...

    def gate_up(self, x: torch.Tensor) -> torch.Tensor: ...


class _ProductLinear(Protocol):
    def product(self, x: torch.Tensor) -> torch.Tensor: ...


class _StepContext(Protocol):
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scoring: Scoring
    ) -> torch.Tensor: ...


_numbers = itertools.count()
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(owner: object) -> int:
    """Give an object a number, under which operators find it for as long as it lives."""
    number = next(_numbers)
    _objects[number] = owner
    return number


def _site(number: int) -> _Site:
    site: _Site = _objects[number]
    return site


@torch.library.custom_op("manylora::site_linear", mutates_args=())
def site_linear(x: torch.Tensor, site: int, num_outputs: int) -> torch.Tensor:
    """[..., K] -> [..., N]: what `Site.linear` computes."""
    return _site(site).linear(x)


@torch.library.custom_op("manylora::site_gate_up", mutates_args=())
def site_gate_up(x: torch.Tensor, site: int, num_outputs: int) -> torch.Tensor:
    """[..., K] -> [..., N / 2]: what `Site.gate_up` computes."""
    return _site(site).gate_up(x)


@torch.library.custom_op("manylora::product", mutates_args=())
def product(x: torch.Tensor, linear: int, num_outputs: int) -> torch.Tensor:
    """[..., K] -> [..., N]: what a `ProductLinear` computes."""
    owner: _ProductLinear = _objects[linear]
    return owner.product(x)


@torch.library.custom_op("manylora::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    context: int,
    layer: int,
    scaling: float,
    window: int,
    softcap: float | None,
) -> torch.Tensor:
    """[1, H, T, D], [1, V, T, D], [1, V, T, E] -> [1, T, H, E]: what `StepContext.attend` computes."""
    owner: _StepContext = _objects[context]
    scoring = Scoring(scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    return owner.attend(query, key, value, layer, scoring).contiguous()


def _fake_columns(x: torch.Tensor, _number: int, num_outputs: int) -> torch.Tensor:
    """What an operator on rows of columns gives, without its content."""
    return x.new_empty(*x.shape[:-1], num_outputs)


for _operator in (site_linear, site_gate_up, product):
    _operator.register_fake(_fake_columns)


@attention.register_fake
def _fake_attention(
    query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_others: object
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
