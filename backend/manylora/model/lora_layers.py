"""Finds the sites of a base model and replaces their linears by layers that add the adapter term.

Shape key: T rows of a step, K inputs, N outputs of a site's S linears together, L layers, P pages.

Which linears share an input is observed, not known by name: a probe runs through the model and linears of
one layer that got the very same tensor form a site. So any architecture works, fused or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from manylora_kernels import SitePool, gate_up_lora, linear_lora, silu_mul
from transformers.pytorch_utils import Conv1D

from manylora.errors import UnsupportedError
from manylora.model import operators
from manylora.model.gated import GatedUnit
from manylora.model.linear import Product, fuse, make_product, weight_of
from manylora.model.spec import LinearSpec, ModelSpec, SiteKind
from manylora.model.step_context import StepContext

_LAYER = re.compile(r"^(?P<stem>.*?)\.(?P<index>\d+)\.(?P<rest>.+)$")


@dataclass(kw_only=True, eq=False)
class Site:
    """The linears of one layer that read the same input: one base product and one adapter term for all.

    The model's code calls its linears one after the other; the first call computes the whole site, the
    others, which get the same tensor, return their part.
    """

    kind: int
    row: int
    widths: tuple[int, ...]
    product: Product
    context: StepContext
    pool: SitePool | None = None
    number: int = field(init=False)
    """Under which a compiled model's operators find the site."""
    _x: torch.Tensor | None = None
    _parts: list[torch.Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.number = operators.register(self)

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Output [..., N_index] of one linear of the site for its input x [..., K]."""
        if self._x is not x or self._parts[index] is None:
            self._parts = list(torch.split(self.linear(x), list(self.widths), dim=-1))
            self._x = x
        result = self._parts[index]
        assert result is not None
        self._parts[index] = None
        if not any(part is not None for part in self._parts):
            self._x = None
        return result

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of all linears side by side, [..., N], for their input x [..., K]."""
        if torch.compiler.is_compiling():
            whole: torch.Tensor = operators.site_linear(x, self.number, sum(self.widths))
            return whole
        mix, x_TK = self.context.mix, x.reshape(-1, x.shape[-1])
        if mix is None or self.pool is None or mix.is_empty:
            y = self.product(x_TK)
        else:
            y = linear_lora(x_TK, self.product, self.pool, mix, self.kind)
        return y.view(*x.shape[:-1], y.shape[-1])

    def gate_up(self, x: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`, [..., N / 2], of a site whose linears are gate and up, in this order."""
        if torch.compiler.is_compiling():
            whole: torch.Tensor = operators.site_gate_up(x, self.number, self.widths[0])
            return whole
        mix, x_TK = self.context.mix, x.reshape(-1, x.shape[-1])
        if mix is None or self.pool is None or mix.is_empty:
            y = silu_mul(self.product(x_TK))
        else:
            y = gate_up_lora(x_TK, self.product, self.pool, mix, self.kind)
        return y.view(*x.shape[:-1], y.shape[-1])


class SiteLinear(torch.nn.Module):
    """Takes the place of a linear of the model."""

    def __init__(self, site: Site, index: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.site = site
        self.index = index
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site.part(self.index, x)


class GatedLinear(torch.nn.Module):
    """Takes the place of a gated unit of the model: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, site: Site, down: torch.nn.Module) -> None:
        super().__init__()
        self.site = site
        self.down = down

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        # The unit's own code takes one tensor, whose name only its caller knows.
        (x,) = (*args, *kwargs.values())
        result: torch.Tensor = self.down(self.site.gate_up(x))
        return result


class ProductLinear(torch.nn.Module):
    """A linear that serves no adapter (lm_head), in the device's fastest form."""

    def __init__(self, product: Product, out_features: int) -> None:
        super().__init__()
        self.product = product
        self.out_features = out_features
        self.number = operators.register(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y: torch.Tensor = operators.product(x, self.number, self.out_features)
            return y
        return self.product(x)


@dataclass(frozen=True, slots=True)
class _Call:
    """One linear's call in the probe."""

    path: str
    input_id: int
    num_rows: int


def find_sites(model: torch.nn.Module, run_probe: Callable[[], object], num_rows: int) -> ModelSpec:
    """Observe a probe of `num_rows` tokens and group the decoder layers' linears by the input they share.

    Raises:
        UnsupportedError: the model has no linear inside numbered layers.
    """
    calls: list[_Call] = []
    # Inputs are kept until the probe ends, so that an id is never used twice.
    alive: list[torch.Tensor] = []
    linears: dict[str, torch.nn.Module]
    linears = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}

    def observe(path: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            alive.append(args[0])
            calls.append(_Call(path, id(args[0]), args[0].numel() // args[0].shape[-1]))

        return hook

    handles = [m.register_forward_pre_hook(observe(path)) for path, m in linears.items()]
    try:
        run_probe()
    finally:
        for handle in handles:
            handle.remove()
    return _spec_of(model, linears, [call for call in calls if call.num_rows == num_rows])


def _spec_of(model: torch.nn.Module, linears: dict[str, torch.nn.Module], calls: list[_Call]) -> ModelSpec:
    groups: dict[tuple[str, int, int], list[str]] = {}
    seen: set[str] = set()
    for call in calls:
        match = _LAYER.match(call.path)
        if match and call.path not in seen:
            seen.add(call.path)
            groups.setdefault((match["stem"], int(match["index"]), call.input_id), []).append(call.path)
    if not groups:
        raise UnsupportedError(
            "the base model has no linear inside numbered decoder layers: nothing to adapt"
        )
    kinds: dict[tuple[str, int, tuple[int, ...]], list[tuple[int, list[str]]]] = {}
    for (_stem, layer, _), paths in groups.items():
        names = "+".join(str(_LAYER.match(path)["rest"]) for path in paths)  # type: ignore[index]  # matched above
        shapes = [shape_of(linears[path]) for path in paths]
        key = (names, shapes[0][1], tuple(n for n, _ in shapes))
        kinds.setdefault(key, []).append((layer, paths))
    specs: dict[str, LinearSpec] = {}
    site_kinds = []
    for index, ((names, k, widths), members) in enumerate(kinds.items()):
        site_kinds.append(SiteKind(name=names, num_layers=len(members), in_features=k, out_features=widths))
        for row, (layer, paths) in enumerate(sorted(members)):
            for part, path in enumerate(paths):
                specs[path] = LinearSpec(
                    path=path,
                    kind=index,
                    row=row,
                    slice=part,
                    layer=layer,
                    in_features=k,
                    out_features=widths[part],
                )
    others = {
        name.rpartition(".")[0]
        for name, _ in model.named_parameters()
        if name.rpartition(".")[0] not in specs
    }
    others |= {path for path in linears if path not in specs}
    return ModelSpec(kinds=tuple(site_kinds), linears=specs, other_modules=frozenset(others))


def shape_of(linear: torch.nn.Module) -> tuple[int, int]:
    """(N, K) of a linear, without copying its weight."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, torch.nn.Linear) else (columns, rows)


def replace_linears(
    model: torch.nn.Module, spec: ModelSpec, context: StepContext, gated_units: Sequence[GatedUnit] = ()
) -> list[Site]:
    """Put a SiteLinear in the place of every linear of `spec`, a GatedLinear in that of every gated unit, and
    a ProductLinear in lm_head's."""
    by_site: dict[tuple[int, int], list[LinearSpec]] = {}
    for linear in spec.linears.values():
        by_site.setdefault((linear.kind, linear.row), []).append(linear)
    sites = []
    for (kind, row), parts in by_site.items():
        parts.sort(key=lambda part: part.slice)
        modules = [model.get_submodule(part.path) for part in parts]
        product = make_product(*fuse(modules))
        site = Site(
            kind=kind, row=row, widths=tuple(p.out_features for p in parts), product=product, context=context
        )
        for part in parts:
            _set_submodule(
                model, part.path, SiteLinear(site, part.slice, part.in_features, part.out_features)
            )
        sites.append(site)
    for unit in gated_units:
        gate = model.get_submodule(unit.gate)
        assert isinstance(gate, SiteLinear)
        _set_submodule(model, unit.path, GatedLinear(gate.site, model.get_submodule(unit.down)))
    _replace_head(model)
    return sites


def _replace_head(model: torch.nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path.rpartition(".")[2] == "lm_head":
            bias = None if module.bias is None else module.bias.detach()
            _set_submodule(
                model, path, ProductLinear(make_product(weight_of(module), bias), module.out_features)
            )


def _set_submodule(model: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
