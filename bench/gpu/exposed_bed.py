"""A step with the base model's weights, and what it should give.

Shape key: T rows, K inputs, N outputs of all linears of a site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from manylora_kernels import SitePool

from bench.gpu.clock import Run
from bench.gpu.rows import Context
from bench.gpu.scene import Scene
from bench.gpu.shapes import Point

NUM_LAYERS = 2
"""The base's weights alone are more than any cache holds."""

SiteRun = Callable[[str, SitePool, torch.Tensor], Run]
"""Of a site's name, its pool and its weight [N, K]: base product and term, into the scene's sums."""


@dataclass(slots=True)
class Bed:
    """A step with the base's weights."""

    scene: Scene
    weights: list[dict[str, torch.Tensor]]
    """Of each layer by site: [N, K]."""
    activates: bool
    """Whether the activation behind gate and up is part of the layer."""
    out: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of gate/up sites: what the activation gives, [T, N / 2]."""
    right: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """What `expected` has found."""

    @classmethod
    def of(cls, point: Point, context: Context, *, activates: bool = False) -> Bed:
        """Make the tensors of a point; those of prompts have the activation in any case."""
        scene = Scene(point, context.layer, context.device, context.dtype, num_layers=NUM_LAYERS)
        weights = [
            {
                name: scene.randn(pool.num_outputs, pool.num_inputs) / pool.num_inputs**0.5
                for name, pool in pools.items()
            }
            for pools in scene.layers
        ]
        bed = cls(scene, weights, activates or point.is_prefill or context.is_tiny)
        if bed.activates:
            bed.out = {
                name: scene.y[name].new_empty(point.num_rows, site.widths[0])
                for name, site in context.layer.items()
                if site.is_gate_up
            }
        return bed

    def base(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The site's base product, into the scene's sums."""
        return torch.mm(self.scene.x[name], weight.t(), out=self.scene.sums[name])

    def layers(self, site_run: SiteRun, *, activation: bool = True) -> Run:
        """One form over all layers and sites.

        Args:
            activation: False: the form has it in already, or goes without.
        """
        steps: list[Run] = []
        for pools, weights in zip(self.scene.layers, self.weights, strict=True):
            for name, pool in pools.items():
                steps.append(site_run(name, pool, weights[name]))
                if name in self.out and activation:
                    steps.append(self._activation(name))

        def run() -> None:
            for step in steps:
                step()

        return run

    def _activation(self, name: str) -> Run:
        from manylora_kernels.lora.triton_form import (
            TRITON,  # imports triton, after the interpreter was chosen
        )

        return lambda: TRITON.silu_mul(self.scene.sums[name], self.out[name])

    def fill_with_nan(self) -> None:
        """So that what `error` finds is of the run behind this."""
        for y in (*self.scene.sums.values(), *self.out.values()):
            y.fill_(torch.nan)

    def check_written(self) -> None:
        """
        Raises:
            AssertionError: a site's sums have not been computed since `fill_with_nan`.
        """
        for name, y in self.scene.sums.items():
            assert not y.isnan().any(), f"{name}: not computed"

    def error(self) -> float:
        """The norm of the error of what the last layer gave, as a share of what the adapters change of it, of
        the worst site; of the rows that the scene picks.

        Raises:
            AssertionError: it is above what the dtype allows.
        """
        worst = 0.0
        picks = torch.from_numpy(self.scene.picks).to(self.scene.device)
        for name, y in self.scene.sums.items():
            found = self.out.get(name, y)[picks].double()
            wanted, change = self.expected(name)
            worst = max(worst, self.scene.share(name, found - wanted, change))
        return worst

    def expected(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What a site of the last layer should give for the picked rows, and what of it the adapters change:
        float64."""
        if name not in self.right:
            picks = torch.from_numpy(self.scene.picks).to(self.scene.device)
            base = self.scene.x[name][picks].double() @ self.weights[-1][name].double().t()
            whole = base + self.scene.term_of(name, self.scene.layers[-1][name])
            if name in self.out:
                base, whole = _silu_mul(base), _silu_mul(whole)
            self.right[name] = whole, whole - base
        return self.right[name]


def _silu_mul(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up
