"""What adapters need to know of a base model: which linears exist, and which share an input.

Shape key: L layers of a kind, S linears of a site, K inputs, N outputs.

A *site* is the linears of one layer that read the same input (q/k/v, o, gate/up, down). A *kind* is
the same site in every layer that has it. Plain Python, so that adapters can be validated without a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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

    @property
    def num_slices(self) -> int:
        """S."""
        return len(self.out_features)

    @property
    def page_elements(self) -> int:
        """Elements of one page (16 rank rows) over all L layers: 16 * L * sum of (K + N)."""
        return 16 * self.num_layers * sum(self.in_features + n for n in self.out_features)


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
