"""Sizes that kernels are compiled for and plans are chosen by.

Shape key: T rows, S linears of a site, K inputs, N outputs of all S; H query heads, V key/value heads, D key
size, E value size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SiteShape:
    """Sizes of one site: what kernels are compiled for and plans are chosen by."""

    num_inputs: int
    """K."""
    widths: tuple[int, ...]
    """Outputs of each of the S linears; their sum is N."""

    @property
    def num_linears(self) -> int:
        """S."""
        return len(self.widths)

    @property
    def num_outputs(self) -> int:
        """N."""
        return sum(self.widths)

    @property
    def is_gate_up(self) -> bool:
        """Whether the site has the form of gate and up: two linears of one width."""
        return self.num_linears == 2 and self.widths[0] == self.widths[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedShapes:
    """What a server's steps look like: everything that decides which kernels they use."""

    sites: tuple[SiteShape, ...]
    """The sites of a layer."""
    row_counts: tuple[int, ...]
    """Numbers of rows that a step may have; `range(1, most + 1)` where they are not rounded up to buckets."""
    max_slots: int
    """Most adapters of a step."""
    max_pages: int
    """Most pages of an adapter in a kind."""
    dtype: torch.dtype
    """Of x and y."""
    pool_dtype: torch.dtype
    """Of the adapters."""
    has_vectors: bool = False
    """Whether adapters may have vectors, which are options of the kernels."""

    def __post_init__(self) -> None:
        if not self.row_counts or min(self.row_counts) < 1:
            raise ValueError(f"row_counts: found {self.row_counts!r}, allowed at least one, all above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """What of a layer's attention decides which kernels it uses."""

    num_heads: int
    """H."""
    num_kv: int
    """V."""
    key_size: int
    """D."""
    value_size: int
    """E."""
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    """Of queries, keys and values, as the model makes them."""
    window: int = 0
    """Tokens that a query sees; 0 is all."""
    has_softcap: bool = False
    sinks: torch.dtype | None = None
    """Of the sinks; None where the layer has none."""

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> AttentionShape:
        """Read a call of a layer's attention.

        Args:
            q: [..., H, T, D].
            k: [..., V, T, D].
            v: [..., V, T, E].
            window: as of `Scoring`.
            softcap: likewise.
            sinks: likewise.
        """
        return cls(
            num_heads=q.shape[-3],
            num_kv=k.shape[-3],
            key_size=k.shape[-1],
            value_size=v.shape[-1],
            dtypes=(q.dtype, k.dtype, v.dtype),
            window=window,
            has_softcap=softcap is not None,
            sinks=None if sinks is None else sinks.dtype,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedAttention:
    """What the attention of a server's steps looks like: everything that decides which kernels it uses."""

    layers: tuple[AttentionShape, ...]
    """Of all layers; equal ones may be left out."""
    cache_dtype: torch.dtype
    block_size: int
    """Tokens of a block of the cache."""
    max_context: int
    """No sequence is longer, in tokens."""
    max_queries: int
    """No sequence has more rows in a step."""
    num_splits: int | None = None
    """As of `PagedBatch`, where the steps fix it."""

    def __post_init__(self) -> None:
        if min(self.block_size, self.max_context, self.max_queries) < 1 or not self.layers:
            raise ValueError(
                f"found {len(self.layers)} layers, block_size {self.block_size}, max_context "
                f"{self.max_context}, max_queries {self.max_queries}; allowed at least 1 each"
            )
