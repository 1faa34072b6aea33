"""Attention over blocked keys and values, as transformers' attention function.

Shape key: T tokens of a step, H query heads, V key/value heads, D key size, E value size.

The model's own code calls `attention_forward` in every layer; what it does stands in the plan of the running
step, which it finds in the model's `StepContext`. There are two: on CUDA the kernels of
`manylora_kernels.attention` write and read the caches through block tables (`paged_attention.py`); elsewhere
sequences are computed in groups (`grouped_attention.py`). A third, `CacheProbe`, observes a model at start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from manylora_kernels import AttentionShape
from manylora_kernels.attention.plan import Scoring
from transformers import AttentionInterface

from manylora.errors import UnsupportedError
from manylora.model import operators
from manylora.model.grouped_attention import Group, attend
from manylora.model.step_context import AttentionCall, LayerCache, StepContext

IMPLEMENTATION = "manylora"
"""The name under which transformers knows this attention."""

_KNOWN_UNUSED = frozenset(
    # Passed by models, and irrelevant to a packed causal decoder: masks are ours, and rotary embeddings are
    # applied before.
    {
        "dropout", "is_causal", "position_ids", "position_embeddings", "cache_position", "use_cache",
        "output_attentions", "output_hidden_states", "return_dict", "past_key_values", "head_mask",
        "num_items_in_batch", "layer_type", "output_router_logits",
    }
)  # fmt: skip


@dataclass(slots=True)
class CacheProbe:
    """The plan of a model that is being observed: records what each layer's attention is."""

    layers: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """layer_idx -> (V, D, E)."""
    shapes: set[AttentionShape] = field(default_factory=set)
    """What decides which kernels the layers use."""

    def attend(self, call: AttentionCall, caches: Mapping[int, LayerCache]) -> torch.Tensor:
        """Attend as one fresh sequence, without a cache: [T, H, E]."""
        scoring = call.scoring
        self.layers[call.layer] = (call.key.shape[0], call.key.shape[2], call.value.shape[2])
        self.shapes.add(
            AttentionShape.of(
                call.query, call.key, call.value, scoring.window, scoring.softcap, scoring.sinks
            )
        )
        num_rows = call.query.shape[1]
        fresh = Group(
            rows=slice(None),
            num_seqs=1,
            num_queries=num_rows,
            context=None,
            positions=torch.arange(num_rows, device=call.query.device)[None],
            num_context=num_rows,
        )
        return attend(fresh, call.query, call.key, call.value, None, scoring)


def use_our_attention(module: torch.nn.Module, context: StepContext) -> None:
    """Have a model call `attention_forward`, which finds its steps in `context`, and build no masks.

    Masks follow from the step's plan. For an attention without a mask function transformers makes none; with
    one it would first look at each step's positions on the host, and wait for the device.
    """
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    module.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]  # PreTrainedModel's method
    for part in module.modules():
        if hasattr(part, "layer_idx"):
            part.step_context = context  # type: ignore[assignment]  # nn.Module declares tensors only


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
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Write the step's keys and values, then attend.

    Args:
        query, key, value: [1, H or V, T, D], rotary embedding applied.
        attention_mask: None; masks follow from the step's plan.
        scaling: factor on the scores; None is D ** -0.5.
        sliding_window: a query sees the last this many tokens, itself among them.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [H] one learned sink logit per head.

    Returns:
        [1, T, H, D] and None.

    Raises:
        UnsupportedError: the model passes an argument that this function does not know.
    """
    context = getattr(module, "step_context", None)
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _KNOWN_UNUSED)
    if unknown or attention_mask is not None or context is None:
        what = "attention_mask" if attention_mask is not None else ", ".join(unknown) or "no layer_idx"
        raise UnsupportedError(
            f"{type(module).__name__} calls its attention with {what}, which is not served"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # transformers' attention modules carry an int
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or 0
    if torch.compiler.is_compiling():
        return operators.attention(
            query, key, value, s_aux, context.number, layer, scaling, window, softcap
        ), None
    scoring = Scoring(scaling=scaling, window=window, softcap=softcap, sinks=s_aux)
    return context.attend(query, key, value, layer, scoring), None
