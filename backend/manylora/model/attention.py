"""Attention over blocked keys and values, as transformers' attention function.

Shape key: T tokens of a step, H query heads, G query heads of one key/value head, V key/value heads,
D head size, B sequences of a group, Q query tokens of each, C context tokens of each, M block size.

The model's own code calls `attention_forward` in every layer; the step's plan comes through the keywords.
On CUDA the kernels of `manylora_kernels.attention` write and read the caches through block tables. On a CPU
rows of sequences that can be computed alike are grouped: all decodes together, fresh prompts of one length
together over the keys at hand, other chunks one by one over gathered blocks. The CPU's compiled form of
decodes reads keys and values where they lie; elsewhere these are gathered, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from manylora_kernels import AttentionShape, attention_cpu
from manylora_kernels.attention_plan import Scoring
from manylora_kernels.paged import PagedBatch
from torch.nn import functional

from manylora.errors import UnsupportedError
from manylora.model import operators

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
class LayerCache:
    """Keys and values of one layer: [blocks * M, V * D] each, row = block * M + offset."""

    keys: torch.Tensor
    values: torch.Tensor
    num_heads: int
    key_size: int
    value_size: int


@dataclass(slots=True, kw_only=True)
class Group:
    """Sequences of one step computed together: B of them, Q query tokens each, C context tokens."""

    rows: torch.Tensor | slice
    """Which of the step's rows, sequence by sequence: B * Q of them."""
    num_seqs: int
    num_queries: int
    context: torch.Tensor | None
    """[B * C] rows of the layer caches; None: the step's own keys are the whole context."""
    positions: torch.Tensor
    """[B, Q] position of each query in its sequence."""
    num_context: int
    """C."""
    masks: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)
    """By window (0: none): what may be seen, as a mask [B, 1, Q, C] to add. Filled by the first layer."""

    def mask(self, window: int, dtype: torch.dtype, *, even_if_causal: bool = False) -> torch.Tensor | None:
        """0 where a query may look, -inf elsewhere: not past itself, not `window` or more tokens back.

        None where that is just the causal triangle over the step's own keys, unless `even_if_causal`.
        """
        if self.context is None and not even_if_causal and (window == 0 or self.num_context <= window):
            return None
        if (window, dtype) not in self.masks:
            self.masks[window, dtype] = self._make_mask(window, dtype)
        return self.masks[window, dtype]

    def _make_mask(self, window: int, dtype: torch.dtype) -> torch.Tensor:
        key_C = torch.arange(self.num_context, device=self.positions.device)
        query_BQ1 = self.positions[:, :, None]
        visible = key_C <= query_BQ1
        if window:
            visible &= key_C > query_BQ1 - window
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, float("-inf"))[:, None]


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


class Steps:
    """The plan of the current step, where a compiled model's attention finds it: code that is compiled once
    is given a number in its place."""

    def __init__(self) -> None:
        self.number = operators.register(self)
        self.plan: AttentionPlan | CacheProbe | None = None
        """Filled around each call of the model."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        layer: int,
        scaling: float,
        window: int,
        softcap: float | None,
    ) -> torch.Tensor:
        """[1, T, H, D]: `attention_forward` by the current plan."""
        assert self.plan is not None
        return _attend_step(self.plan, query, key, value, sinks, layer, scaling, window, softcap)


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
        manylora_plan: the step's plan; in a compiled model the number of the `Steps` that hold it.

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
        out = operators.attention(query, key, value, s_aux, manylora_plan, layer, scaling, window, softcap)
    else:
        out = _attend_step(manylora_plan, query, key, value, s_aux, layer, scaling, window, softcap)
    return out, None


def _attend_step(
    plan: AttentionPlan | CacheProbe,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layer: int,
    scaling: float,
    window: int,
    softcap: float | None,
) -> torch.Tensor:
    """One layer's attention of a whole step: [1, T, H, D]."""
    if isinstance(plan, CacheProbe):
        plan.layers[layer] = (key.shape[1], key.shape[3], value.shape[3])
        plan.shapes.add(AttentionShape.of(query, key, value, window, softcap, sinks))
        num_rows = query.shape[2]
        rows = torch.arange(num_rows, device=query.device)
        probe = Group(
            rows=slice(None),
            num_seqs=1,
            num_queries=num_rows,
            context=None,
            positions=rows[None],
            num_context=num_rows,
        )
        return _attend(probe, query[0], key[0], value[0], None, scaling, window, softcap, sinks)[None]
    cache = plan.caches[layer]
    if plan.paged is not None:
        scoring = Scoring(scaling=scaling, window=window, softcap=softcap, sinks=sinks)
        return _attend_paged(query[0], key[0], value[0], cache, plan.paged, scoring)[None]
    cache.keys.index_copy_(0, plan.write_rows, key[0].transpose(0, 1).flatten(1))
    cache.values.index_copy_(0, plan.write_rows, value[0].transpose(0, 1).flatten(1))
    groups = plan.groups
    if len(groups) == 1 and isinstance(groups[0].rows, slice):
        return _attend(groups[0], query[0], key[0], value[0], cache, scaling, window, softcap, sinks)[None]
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [T, H, D]
    for group in groups:
        out[group.rows] = _attend(group, query[0], key[0], value[0], cache, scaling, window, softcap, sinks)
    return out[None]


def _attend_paged(
    query_HTD: torch.Tensor,
    key_VTD: torch.Tensor,
    value_VTD: torch.Tensor,
    cache: LayerCache,
    batch: PagedBatch,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of a whole step over the blocks where they lie: [T, H, D]."""
    from manylora_kernels.attention import paged_attention, write_cache  # imports triton: not for a CPU

    # Models hand over what their rotary embedding made, whose last stride is 1, or a view of a projection.
    query_HTD, key_VTD, value_VTD = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (query_HTD, key_VTD, value_VTD)
    )
    write_cache(cache.keys, cache.values, key_VTD, value_VTD, batch.write_rows)
    return paged_attention(query_HTD, cache.keys, cache.values, batch, scoring)


def _attend(
    group: Group,
    query_HTD: torch.Tensor,
    key_VTD: torch.Tensor,
    value_VTD: torch.Tensor,
    cache: LayerCache | None,
    scaling: float,
    window: int,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one group: [B * Q, H, D]."""
    num_seqs, num_queries = group.num_seqs, group.num_queries
    num_heads, _, size = query_HTD.shape
    num_kv = key_VTD.shape[0]
    per_kv = num_heads // num_kv
    is_plain = softcap is None and s_aux is None
    if num_queries == 1 and cache is not None and group.context is not None and is_plain:
        q = query_HTD[:, group.rows]
        if attention_cpu.serves(q, cache.keys, cache.values):
            context, positions = group.context.view(num_seqs, -1), group.positions.view(-1)
            return attention_cpu.decode_attention(
                q, cache.keys, cache.values, context, positions, num_kv, scaling, window
            )
    q = query_HTD[:, group.rows].view(num_kv, per_kv, num_seqs, num_queries, size)
    # The query heads of one key/value head become further queries, so no key is repeated.
    q = q.permute(2, 0, 1, 3, 4).reshape(num_seqs, num_kv, per_kv * num_queries, size)
    if group.context is None:
        k = key_VTD[:, group.rows].view(num_kv, num_seqs, num_queries, size).transpose(0, 1)
        v = value_VTD[:, group.rows].view(num_kv, num_seqs, num_queries, -1).transpose(0, 1)
    else:
        assert cache is not None
        k = functional.embedding(group.context, cache.keys)
        v = functional.embedding(group.context, cache.values)
        k = k.view(num_seqs, group.num_context, num_kv, cache.key_size).transpose(1, 2)
        v = v.view(num_seqs, group.num_context, num_kv, cache.value_size).transpose(1, 2)
    if is_plain:
        out = _sdpa(group, q, k, v, scaling, window, per_kv)
    else:
        out = _explicit(group, q, k, v, scaling, window, per_kv, softcap, s_aux)
    out = out.view(num_seqs, num_kv, per_kv, num_queries, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(num_seqs * num_queries, num_heads, -1)


def _sdpa(
    group: Group, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int, per_kv: int
) -> torch.Tensor:
    mask = group.mask(window, q.dtype)
    if mask is not None or group.num_queries == 1:
        folded = None if mask is None else _fold(mask, per_kv)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=folded, scale=scaling)
    # Plain causal: the kernel skips the upper half, which is worth a copy of the keys per query head.
    num_seqs, num_kv, _, size = q.shape
    q = q.view(num_seqs, num_kv * per_kv, group.num_queries, size)
    k, v = (t.repeat_interleave(per_kv, dim=1) if per_kv > 1 else t for t in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return out.reshape(num_seqs, num_kv, per_kv * group.num_queries, -1)


def _fold(mask: torch.Tensor, per_kv: int) -> torch.Tensor:
    """Repeat a mask [B, 1, Q, C] for the query heads that were folded into the queries."""
    return mask if mask.shape[2] == 1 or per_kv == 1 else mask.repeat(1, 1, per_kv, 1)


def _explicit(
    group: Group,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    window: int,
    per_kv: int,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """The same in plain operators, for what scaled_dot_product_attention cannot say: soft cap and sinks."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = group.mask(window, torch.float32, even_if_causal=True)
    assert mask is not None
    scores = scores + _fold(mask, per_kv)
    if s_aux is None:
        return torch.matmul(scores.softmax(-1).to(v.dtype), v)
    num_kv = k.shape[1]
    sinks = s_aux.float().view(1, num_kv, per_kv, 1, 1).expand(scores.shape[0], -1, -1, group.num_queries, -1)
    with_sink = torch.cat([scores, sinks.reshape(*scores.shape[:3], 1)], dim=-1)
    return torch.matmul(with_sink.softmax(-1)[..., :-1].to(v.dtype), v)
