"""What adapters need to know of a base model: which linears exist, and which share an input.

Shape key: L layers of a kind, S linears of a site, K inputs, N outputs.

A *site* is the linears of one layer that read the same input (q/k/v, o, gate/up, down). A *kind* is
the same site in every layer that has it. Plain Python, so that adapters can be validated without a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from manylora.model.parts import PAGINGS, PARTS, PagedBy, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteKind:
    """The same site in every layer: its linears share one input of `in_features` columns."""

    name: str
    """Module names relative to the layer, joined with '+', e.g. `self_attn.q_proj+self_attn.k_proj`."""
    num_layers: int
    """L: how many layers have this site."""
    in_features: int
    """K."""
    out_features: tuple[int, ...]
    """N of each of the S linears, in site order."""
    parts: tuple[Part, ...] = PARTS
    """What an adapter has here."""

    @property
    def num_slices(self) -> int:
        """S."""
        return len(self.out_features)

    def page_shape(self, part: Part) -> tuple[int, ...]:
        """Of one page of a part in one layer."""
        return part.page_shape(self.num_slices, self.in_features, sum(self.out_features))

    def page_elements(self, paged_by: PagedBy = PagedBy.RANK_ROWS) -> int:
        """Elements of one page over all L layers: L * the sum of its parts' shapes. For A and B that is
        16 * L * the sum over the linears of (K + N)."""
        parts = [part for part in self.parts if part.paged_by is paged_by]
        return self.num_layers * sum(math.prod(self.page_shape(part)) for part in parts)


@dataclass(frozen=True, slots=True)
class PageGroup:
    """The parts of a kind that share pages: page n of each belongs to one adapter."""

    kind: SiteKind
    paged_by: PagedBy

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of the table."""
        return tuple(part for part in self.kind.parts if part.paged_by is self.paged_by)

    @property
    def page_elements(self) -> int:
        """As of the kind."""
        return self.kind.page_elements(self.paged_by)


def page_groups(kinds: Sequence[SiteKind]) -> tuple[PageGroup, ...]:
    """All groups of a model's kinds: first those that are paged by rank rows, in the kinds' order, so that
    group n is of kind n, then the same of those that are paged by adapter."""
    return tuple(PageGroup(kind, paged_by) for paged_by in PAGINGS for kind in kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """One linear that an adapter can target."""

    path: str
    """Its name in `model.named_modules()`, e.g. `model.layers.3.self_attn.q_proj`."""
    kind: int
    """Index in `ModelSpec.kinds`."""
    row: int
    """0 .. L-1: which of the kind's layers."""
    slice: int
    """0 .. S-1: which of the site's linears."""
    layer: int
    """The decoder layer's index as PEFT's `layers_to_transform` counts it."""
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything an adapter is validated against."""

    kinds: tuple[SiteKind, ...]
    linears: dict[str, LinearSpec]
    """By path."""
    other_modules: frozenset[str] = field(default_factory=frozenset)
    """Paths of the modules that hold weights but serve no adapter (embeddings, lm_head, norms, experts)."""
