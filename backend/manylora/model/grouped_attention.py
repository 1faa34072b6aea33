"""Attention over blocked keys and values where the paged kernels do not serve, above all on a CPU.

Shape key: T tokens of a step, H query heads, G query heads of one key/value head, V key/value heads,
D head size, B sequences of a group, Q query tokens of each, C context tokens of each, M block size.

Rows of sequences that can be computed alike are grouped: all decodes together, fresh prompts of one length
together over the keys at hand, other chunks one by one over gathered blocks. The CPU's compiled form of
decodes reads keys and values where they lie; elsewhere these are gathered, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from manylora_kernels.attention import cpu as attention_cpu
from manylora_kernels.attention.plan import Scoring
from torch.nn import functional

from manylora.model.step_context import AttentionCall, LayerCache


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
class GroupedPlan:
    """A step whose attention is computed group by group. Built by engine/step_tensors.py."""

    write_rows: torch.Tensor
    """[T] where each token's key and value go in the layer caches."""
    groups: list[Group]

    def attend(self, call: AttentionCall, caches: Mapping[int, LayerCache]) -> torch.Tensor:
        """As `AttentionPlan.attend` says."""
        cache = caches[call.layer]
        cache.keys.index_copy_(0, self.write_rows, call.key.transpose(0, 1).flatten(1))
        cache.values.index_copy_(0, self.write_rows, call.value.transpose(0, 1).flatten(1))
        if len(self.groups) == 1 and isinstance(self.groups[0].rows, slice):
            return attend(self.groups[0], call.query, call.key, call.value, cache, call.scoring)
        num_heads, num_rows, _ = call.query.shape
        out = call.query.new_empty(num_rows, num_heads, call.value.shape[2])
        for group in self.groups:
            out[group.rows] = attend(group, call.query, call.key, call.value, cache, call.scoring)
        return out


def attend(
    group: Group,
    query_HTD: torch.Tensor,
    key_VTD: torch.Tensor,
    value_VTD: torch.Tensor,
    cache: LayerCache | None,
    scoring: Scoring,
) -> torch.Tensor:
    """Attend with the rows of one group: [B * Q, H, D].

    Args:
        query_HTD: of the whole step, like the next two.
        key_VTD: read where the group's context is the step's own keys.
        value_VTD: likewise.
        cache: holds the step's keys and values already; None: no group has a context in it.
        scoring: the layer's.
    """
    num_seqs, num_queries = group.num_seqs, group.num_queries
    num_heads, _, size = query_HTD.shape
    num_kv = key_VTD.shape[0]
    per_kv = num_heads // num_kv
    is_plain = scoring.softcap is None and scoring.sinks is None
    if num_queries == 1 and cache is not None and group.context is not None and is_plain:
        q = query_HTD[:, group.rows]
        if attention_cpu.serves(q, cache.keys, cache.values):
            context, positions = group.context.view(num_seqs, -1), group.positions.view(-1)
            return attention_cpu.decode_attention(
                q, cache.keys, cache.values, context, positions, num_kv, scoring.scaling, scoring.window
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
    compute = _sdpa if is_plain else _explicit
    out = compute(group, q, k, v, scoring, per_kv)
    out = out.view(num_seqs, num_kv, per_kv, num_queries, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(num_seqs * num_queries, num_heads, -1)


def _sdpa(
    group: Group, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, per_kv: int
) -> torch.Tensor:
    mask = group.mask(scoring.window, q.dtype)
    if mask is not None or group.num_queries == 1:
        folded = None if mask is None else _fold(mask, per_kv)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=folded, scale=scoring.scaling)
    # Plain causal: the kernel skips the upper half, which is worth a copy of the keys per query head.
    num_seqs, num_kv, _, size = q.shape
    q = q.view(num_seqs, num_kv * per_kv, group.num_queries, size)
    k, v = (t.repeat_interleave(per_kv, dim=1) if per_kv > 1 else t for t in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scoring.scaling)
    return out.reshape(num_seqs, num_kv, per_kv * group.num_queries, -1)


def _fold(mask: torch.Tensor, per_kv: int) -> torch.Tensor:
    """Repeat a mask [B, 1, Q, C] for the query heads that were folded into the queries."""
    return mask if mask.shape[2] == 1 or per_kv == 1 else mask.repeat(1, 1, per_kv, 1)


def _explicit(
    group: Group, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, per_kv: int
) -> torch.Tensor:
    """The same in plain operators, for soft caps and sinks, which scaled_dot_product_attention has not."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scoring.scaling
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    mask = group.mask(scoring.window, torch.float32, even_if_causal=True)
    assert mask is not None
    scores = scores + _fold(mask, per_kv)
    if scoring.sinks is None:
        return torch.matmul(scores.softmax(-1).to(v.dtype), v)
    num_kv = k.shape[1]
    sinks = scoring.sinks.float().view(1, num_kv, per_kv, 1, 1)
    sinks = sinks.expand(scores.shape[0], -1, -1, group.num_queries, -1)
    with_sink = torch.cat([scores, sinks.reshape(*scores.shape[:3], 1)], dim=-1)
    return torch.matmul(with_sink.softmax(-1)[..., :-1].to(v.dtype), v)
