"""PEFT's mixed batch: `adapter_names` on a stack of linears of a layer's shapes.

PEFT computes the base product and the term in one call and asks the host for the rows of each adapter, so no
graph can hold it: it is measured as it runs, base product included.
"""

from __future__ import annotations

import torch

from bench.gpu.clock import Run
from bench.gpu.peer_modules import Missing
from bench.gpu.scene import SCALE, Scene

_BASE = "__base__"
"""PEFT's name for a row without an adapter."""


class _Stack(torch.nn.Module):
    """The linears of a layer, one by one, as PEFT finds them in a model."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.linears = torch.nn.ModuleDict(
            {
                f"{name}_{s}": torch.nn.Linear(
                    site.num_inputs, width, bias=False, device=scene.device, dtype=scene.dtype
                )
                for name, site in scene.layer.items()
                for s, width in enumerate(site.widths)
            }
        )

    def forward(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [linear(inputs[name.rpartition("_")[0]]) for name, linear in self.linears.items()]


class Peft:
    """A step prepared for PEFT.

    Raises:
        Missing: PEFT is not installed.
    """

    def __init__(self, scene: Scene) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise Missing("peft is not installed") from error
        self.scene, self.stack = scene, _Stack(scene).eval().requires_grad_(False)
        names = list(self.stack.linears)
        self.weights = {name: linear.weight for name, linear in self.stack.linears.items()}
        self.model = None
        for d, rank in enumerate(scene.ranks()):
            # PEFT's own scaling is alpha / r.
            config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names)
            if self.model is None:
                self.model = get_peft_model(self.stack, config, f"a{d}", autocast_adapter_dtype=False)
            else:
                self.model.add_adapter(f"a{d}", config)
            self._fill(d)
        self.model.eval()
        self.names = [_BASE if slot < 0 else f"a{slot}" for slot in scene.slots.tolist()]

    @torch.no_grad()
    def _fill(self, adapter: int) -> None:
        layer = self.scene.layers[0]
        for name, linear in self.stack.linears.items():
            site, _, nth = name.rpartition("_")
            pool = layer[site]
            b = self.scene.stacked_b(pool, adapter).split(list(pool.widths), dim=1)[int(nth)]
            for half, values in (
                (linear.lora_A, self.scene.stacked_a(pool, adapter)[int(nth)]),
                (linear.lora_B, b.t()),
            ):
                module = half[f"a{adapter}"].to(self.scene.device, self.scene.dtype)
                module.weight.copy_(values)

    def run(self) -> list[torch.Tensor]:
        """One layer: the outputs of all linears."""
        outputs: list[torch.Tensor] = self.model(self.scene.x, adapter_names=self.names)  # type: ignore[misc]
        return outputs

    def base(self) -> Run:
        """The same linears without adapters, for the difference."""
        inputs = {name: self.scene.x[name.rpartition("_")[0]] for name in self.weights}

        def run() -> None:
            for name, weight in self.weights.items():
                torch.nn.functional.linear(inputs[name], weight)

        return run

    def check(self) -> float:
        """The error of the term, found as the difference to the base product, as `Scene.share` has it.

        Raises:
            AssertionError: it is above what rounding the sum and the base product allows.
        """
        outputs, worst = iter(self.run()), 0.0
        picks = torch.from_numpy(self.scene.picks).to(self.scene.device)
        for name, site in self.scene.layer.items():
            parts = []
            for s in range(site.num_linears):
                base = self.scene.x[name][picks].double() @ self.weights[f"{name}_{s}"].double().t()
                parts.append(next(outputs)[picks].double() - base)
            found = torch.cat(parts, dim=1)
            term = self.scene.term(name)
            worst = max(worst, self.scene.share(name, found - term, term))
        return worst
