"""Which modules are taken for gated units, by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from manylora import EngineConfig
from manylora.model.gated import GatedUnit, find_gated_units, put_gates_first
from manylora.model.loading import load_model
from manylora.model.lora_layers import GatedLinear, find_sites, replace_linears
from manylora.model.spec import ModelSpec
from manylora.model.step_context import StepContext
from torch.nn import functional

K, WIDTH, NUM_ROWS = 24, 40, 5


class Unit(torch.nn.Module):
    """A gated unit as a model may write it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one = torch.nn.Linear(K, WIDTH, dtype=dtype)
        self.two = torch.nn.Linear(K, WIDTH, bias=False, dtype=dtype)
        self.three = torch.nn.Linear(WIDTH, K, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.three(functional.silu(self.one(x)) * self.two(x))
        return out


class UpFirst(Unit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.one(x)
        out: torch.Tensor = self.three(up * functional.silu(self.two(x)))
        return out


class Gelu(Unit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.three(functional.gelu(self.one(x)) * self.two(x))
        return out


class Clamped(Unit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.three(functional.silu(self.one(x).clamp(max=9.0)) * self.two(x))
        return out


class Doubled(Unit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = 2 * self.three(functional.silu(self.one(x)) * self.two(x))
        return out


class Scaled(Unit):
    """Has one more parameter, which happens to change nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.three(functional.silu(self.one(x)) * self.two(x) * self.scale)
        return out


class TakesMore(Unit):
    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        out: torch.Tensor = self.three(functional.silu(self.one(x)) * self.two(x) * factor)
        return out


class Model(torch.nn.Module):
    """Two layers of a unit."""

    def __init__(self, unit: Callable[[], Unit]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": unit()}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["mlp"](x)
        return x


def look_at(unit: Callable[[], Unit]) -> tuple[Model, ModelSpec, list[GatedUnit]]:
    torch.manual_seed(0)
    model = Model(unit).eval().requires_grad_(False)
    x = torch.randn(1, NUM_ROWS, K, dtype=model.layers[0]["mlp"].one.weight.dtype)
    spec = find_sites(model, lambda: model(x), NUM_ROWS)
    return model, spec, find_gated_units(model, spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("unit", "gate", "up"), [(Unit, "one", "two"), (UpFirst, "two", "one")], ids=["gate_first", "up_first"]
)
def test_a_gated_unit_is_found_and_computes_the_same(
    unit: type[Unit], gate: str, up: str, dtype: torch.dtype
) -> None:
    model, spec, found = look_at(lambda: unit(dtype))
    assert found == [
        GatedUnit(
            path=f"layers.{i}.mlp",
            gate=f"layers.{i}.mlp.{gate}",
            up=f"layers.{i}.mlp.{up}",
            down=f"layers.{i}.mlp.three",
        )
        for i in range(2)
    ]
    x = torch.randn(1, NUM_ROWS, K, dtype=dtype)
    expected = model(x)
    ordered = put_gates_first(spec, found)
    assert [ordered.linears[found[0].gate].slice, ordered.linears[found[0].up].slice] == [0, 1]
    replace_linears(model, ordered, StepContext(), found)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("unit", [Gelu, Clamped, Doubled, Scaled, TakesMore])
def test_what_computes_something_else_or_more_is_left_alone(unit: type[Unit]) -> None:
    assert look_at(unit)[2] == []


@pytest.mark.parametrize(
    ("family", "num_units"),
    [
        ("llama", 4),
        ("qwen3", 4),
        ("mistral", 4),
        ("gemma2", 0),
        ("gemma3", 0),
        ("phi3", 0),
        ("gpt_oss", 0),
        ("qwen3_moe", 0),
        ("cohere", 0),
        ("gpt2", 0),
    ],
)
def test_families(tiny_model: Callable[..., Path], family: str, num_units: int) -> None:
    """gelu, a fused gate and up, experts, and a site that has more than gate and up are no units."""
    loaded = load_model(EngineConfig(base_model=str(tiny_model(family))))
    assert sum(isinstance(m, GatedLinear) for m in loaded.module.modules()) == num_units
