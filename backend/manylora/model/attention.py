"""Attention over blocked keys and values, as transformers' attention function.

Shape key: T tokens of a step, H query heads, V key/value heads, D head size.

The model's own code calls `attention_forward` in every layer; the step's plan comes through the keywords.
On CUDA the kernels of `manylora_kernels.attention` write and read the caches through block tables; elsewhere
sequences are computed in groups (`grouped_attention.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from manylora_kernels import AttentionShape
from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.attention.plan import Scoring

from manylora.errors import UnsupportedError
from manylora.model import grouped_attention, operators
from manylora.model.grouped_attention import Group, LayerCache

IMPLEMENTATION = "manylora"
"""The name under which transformers knows this attention."""

_KNOWN_UNUSED = frozenset(
    # Handed on by models, without bearing on a packed causal decoder: masks are ours, and rotary
    # embeddings are applied before.
    {
        "dropout", "is_causal", "position_ids", "position_embeddings", "cache_position", "use_cache",
        "output_attentions", "output_hidden_states", "return_dict", "past_key_values", "head_mask",
        "num_items_in_batch", "layer_type", "output_router_logits",
    }
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class AttentionPlan:
    """What the attention of one step does, the same in every layer. Built by engine/batch.py."""

    write_rows: torch.Tensor
    """[T] where each token's key and value go in the layer caches."""
    groups: list[Group]
    """Empty where `paged` is filled."""
    paged: PagedBatch | None = None
    """The block tables, where the paged kernels serve: on CUDA."""
    caches: dict[int, LayerCache]
    """By layer_idx."""


@dataclass(slots=True)
class CacheProbe:
    """Stands in for a plan while the model is being looked at: records each layer's key and value shapes."""

    layers: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """layer_idx -> (V, key D, value D)."""
    shapes: set[AttentionShape] = field(default_factory=set)
    """What decides which kernels the layers use."""


class PlanHolder:
    """The plan of the current step, where a compiled model's attention finds it: code that is compiled once
    is given a number in its place."""

    def __init__(self) -> None:
        self.number = operators.register(self)
        self.plan: AttentionPlan | CacheProbe | None = None
        """Filled around each call of the model."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scoring: Scoring
    ) -> torch.Tensor:
        """[1, T, H, D]: `attention_forward` by the current plan."""
        assert self.plan is not None
        return _attend_step(self.plan, query, key, value, layer, scoring)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    manylora_plan: AttentionPlan | CacheProbe | int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Write the step's keys and values, then attend.

    Args:
        query, key, value: [1, H or V, T, D], rotary embedding applied.
        attention_mask: None; masks follow from the plan.
        scaling: factor on the scores; None is D ** -0.5.
        sliding_window: a query sees the last this many tokens, itself among them.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [H] one learned sink logit per head.
        manylora_plan: the step's plan; in a compiled model the number of the `PlanHolder` that has it.

    Returns:
        [1, T, H, D] and None.

    Raises:
        UnsupportedError: the model hands over an argument that this function does not know.
    """
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _KNOWN_UNUSED)
    if unknown or attention_mask is not None or manylora_plan is None:
        what = "attention_mask" if attention_mask is not None else ", ".join(unknown) or "no step plan"
        raise UnsupportedError(
            f"{type(module).__name__} calls its attention with {what}, which is not served"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # transformers' attention modules carry an int
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or 0
    if isinstance(manylora_plan, int):
        return operators.attention(
            query, key, value, s_aux, manylora_plan, layer, scaling, window, softcap
        ), None
    scoring = Scoring(scaling=scaling, window=window, softcap=softcap, sinks=s_aux)
    return _attend_step(manylora_plan, query, key, value, layer, scoring), None


def _attend_step(
    plan: AttentionPlan | CacheProbe,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scoring: Scoring,
) -> torch.Tensor:
    """One layer's attention of a whole step: [1, T, H, D]."""
    if isinstance(plan, CacheProbe):
        return _look(plan, query, key, value, layer, scoring)[None]
    cache = plan.caches[layer]
    if plan.paged is not None:
        return _attend_paged(query[0], key[0], value[0], cache, plan.paged, scoring)[None]
    cache.keys.index_copy_(0, plan.write_rows, key[0].transpose(0, 1).flatten(1))
    cache.values.index_copy_(0, plan.write_rows, value[0].transpose(0, 1).flatten(1))
    groups = plan.groups
    if len(groups) == 1 and isinstance(groups[0].rows, slice):
        return grouped_attention.attend(groups[0], query[0], key[0], value[0], cache, scoring)[None]
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [T, H, D]
    for group in groups:
        out[group.rows] = grouped_attention.attend(group, query[0], key[0], value[0], cache, scoring)
    return out[None]


def _look(
    probe: CacheProbe,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scoring: Scoring,
) -> torch.Tensor:
    """Record what a layer's attention is, and attend as one fresh sequence: [T, H, D]."""
    probe.layers[layer] = (key.shape[1], key.shape[3], value.shape[3])
    probe.shapes.add(AttentionShape.of(query, key, value, scoring.window, scoring.softcap, scoring.sinks))
    num_rows = query.shape[2]
    fresh = Group(
        rows=slice(None),
        num_seqs=1,
        num_queries=num_rows,
        context=None,
        positions=torch.arange(num_rows, device=query.device)[None],
        num_context=num_rows,
    )
    return grouped_attention.attend(fresh, query[0], key[0], value[0], None, scoring)


def _attend_paged(
    query_HTD: torch.Tensor,
    key_VTD: torch.Tensor,
    value_VTD: torch.Tensor,
    cache: LayerCache,
    batch: PagedBatch,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of a whole step over the blocks where they lie: [T, H, D]."""
    from manylora_kernels.attention.paged_attention import (  # imports triton: not for a CPU
        paged_attention,
        write_cache,
    )

    write_cache(cache.keys, cache.values, key_VTD, value_VTD, batch.write_rows)
    return paged_attention(query_HTD, cache.keys, cache.values, batch, scoring)
