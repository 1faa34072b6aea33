"""Finds the gated units of a base model, whose activation is computed together with their gate/up site.

Shape key: T rows, K inputs, N outputs of each of gate and up.

A *gated unit* is a module that computes `down(silu(gate(x)) * up(x))` and nothing else. It is found by what
it computes, not by name: a module that holds the two linears of a site, one more, and no other parameters
runs on random numbers, and the input of its third linear is compared.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from manylora.model.spec import LinearSpec, ModelSpec

log = logging.getLogger(__name__)

_NUM_ROWS = 16
_GATE_SPREAD = 4.0
"""Standard deviation of the gates in the comparison: wide enough to reveal a gate that is clipped."""


@dataclass(frozen=True, slots=True)
class GatedUnit:
    """Where a module's three linears are."""

    path: str
    gate: str
    up: str
    down: str


def find_gated_units(model: torch.nn.Module, spec: ModelSpec) -> list[GatedUnit]:
    """Look at every site of two linears of one width. The linears must still be the model's own."""
    by_site: dict[tuple[int, int], list[LinearSpec]] = {}
    for linear in spec.linears.values():
        by_site.setdefault((linear.kind, linear.row), []).append(linear)
    found = [unit for parts in by_site.values() if (unit := _unit_of(model, parts)) is not None]
    log.info("%d gated units are computed with their activation", len(found))
    return found


def put_gates_first(spec: ModelSpec, units: list[GatedUnit]) -> ModelSpec:
    """Order the linears of each unit's site as the kernels read them: gate, then up."""
    linears = dict(spec.linears)
    for unit in units:
        for place, path in enumerate((unit.gate, unit.up)):
            linears[path] = replace(linears[path], slice=place)
    return replace(spec, linears=linears)


def _unit_of(model: torch.nn.Module, parts: list[LinearSpec]) -> GatedUnit | None:
    if len(parts) != 2 or parts[0].out_features != parts[1].out_features:
        return None
    first, second = (part.path for part in sorted(parts, key=lambda part: part.slice))
    parent = first.rpartition(".")[0]
    if second.rpartition(".")[0] != parent:
        return None
    module = model.get_submodule(parent)
    linears = [name for name, child in module.named_modules() if isinstance(child, torch.nn.Linear | Conv1D)]
    others = [f"{parent}.{name}" for name in linears if f"{parent}.{name}" not in (first, second)]
    if len(others) != 1 or not _holds_only(module, linears) or not _takes_one_tensor(module):
        return None
    for gate, up in ((first, second), (second, first)):
        unit = GatedUnit(path=parent, gate=gate, up=up, down=others[0])
        if _computes(model, unit, parts[0].in_features):
            return unit
    return None


def _holds_only(module: torch.nn.Module, linears: list[str]) -> bool:
    """Whether the module has no tensors but those of its linears."""
    mine = {id(t) for name in linears for t in _tensors(module.get_submodule(name))}
    return all(id(t) in mine for t in _tensors(module))


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _takes_one_tensor(module: torch.nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _computes(model: torch.nn.Module, unit: GatedUnit, num_inputs: int) -> bool:
    """Whether the unit computes the formula, exact but for rounding, row by row and column by column."""
    gate, up, down = (model.get_submodule(path) for path in (unit.gate, unit.up, unit.down))
    weight = next(gate.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _NUM_ROWS, num_inputs, generator=generator).to(weight.device, weight.dtype)
    x = x * (_GATE_SPREAD / gate(x).float().std().clamp(min=1e-6)).to(weight.dtype)
    seen: list[torch.Tensor] = []
    handle = down.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        result: Any = model.get_submodule(unit.path)(x)
    finally:
        handle.remove()
    if len(seen) != 1 or not isinstance(result, torch.Tensor):
        return False
    wanted = functional.silu(gate(x)) * up(x)
    return _close(seen[0], wanted) and _close(result, down(seen[0]))


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    # A few roundings; the least part of the largest number where terms cancel.
    eps = torch.finfo(wanted.dtype).eps
    atol = 1e-3 * eps * float(wanted.abs().max())
    return torch.allclose(found.float(), wanted.float(), rtol=4 * eps, atol=atol)
