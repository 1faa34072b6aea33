"""What adapters add to a layer's base products, in one captured graph of both.

Shape key: T rows, K inputs, N outputs of all linears of a site.

The base of a layer is the product of each site, and for prompts also the activation behind gate and up, by
our own kernel on rows without adapters: so the fused form gains no more than fusion gains.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from manylora_kernels import SitePool

from gpu import forms, peer_sglang
from gpu.budget import Deadline
from gpu.clock import Run, Timing, graph_of, time_of
from gpu.part_kernels import attempt
from gpu.peer_modules import Missing
from gpu.rows import Context, Row
from gpu.scene import TOLERANCE, Scene, Term
from gpu.shapes import TINY_POINTS, Point

BASE = "base"
IN_TURN = "manylora, in turn"
BESIDE = "manylora, shrink beside the base"
FUSED = "manylora, fused with the activation"
POINTS = (
    Point(32, 1, (16,)),
    Point(8192, 1, (16,)),
    Point(1, 1, (16,)),
    Point(32, 32, (16,)),
    Point(64, 64, (64,)),
)
_NUM_LAYERS = 2
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

    @classmethod
    def of(cls, point: Point, context: Context) -> Bed:
        """Make the tensors of a point."""
        scene = Scene(point, context.layer, context.device, context.dtype, num_layers=_NUM_LAYERS)
        weights = [
            {
                name: scene.randn(pool.num_outputs, pool.num_inputs) / pool.num_inputs**0.5
                for name, pool in pools.items()
            }
            for pools in scene.layers
        ]
        bed = cls(scene, weights, activates=point.is_prefill or context.is_tiny)
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

    def layers(self, site_run: SiteRun, *, fused: bool = False) -> Run:
        """One form over all layers and sites, with the activation unless it is `fused` in already."""
        steps: list[Run] = []
        for pools, weights in zip(self.scene.layers, self.weights, strict=True):
            for name, pool in pools.items():
                steps.append(site_run(name, pool, weights[name]))
                if name in self.out and not fused:
                    steps.append(self._activation(name, pool))

        def run() -> None:
            for step in steps:
                step()

        return run

    def _activation(self, name: str, pool: SitePool) -> Run:
        from manylora_kernels import gpu  # imports triton, after the interpreter was chosen
        from manylora_kernels.routed import RoutedMix

        scene = self.scene
        nobody = np.full(scene.point.num_rows, -1, dtype=np.int32)
        mix = RoutedMix.build(nobody, scene.scales, [[]], 1, scene.max_pages, scene.device)
        h = gpu.shrink_lora(scene.x[name], pool, mix, 0)
        return lambda: gpu.expand_lora_silu_mul(self.out[name], scene.sums[name], h, pool, mix, 0)

    def results(self) -> dict[str, torch.Tensor]:
        """What the last layer gave: the activation where there is one, else y."""
        return {name: self.out.get(name, y).clone() for name, y in self.scene.sums.items()}


def run(context: Context, deadline: Deadline) -> Iterator[Row]:
    """The rows of the points until the time is up."""
    for point in TINY_POINTS[:1] if context.is_tiny else POINTS:
        if deadline.is_over:
            print(f"exposed: time is up before {point}", flush=True)
            return
        with torch.inference_mode():
            yield from measure(context, point)


def measure(context: Context, point: Point) -> Iterator[Row]:
    """Compare one point's forms with each other, then time them in turn."""
    bed = Bed.of(point, context)
    right: dict[str, torch.Tensor] = {}
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    for name, make in _makers(context, bed).items():
        if name in context.leave_out:
            continue

        def ready(name: str = name, make: Callable[[], Run] = make) -> tuple[float, Run]:
            form = make()
            form()
            found = bed.results()
            if name == IN_TURN:
                right.update(found)
            return _error(found, right), graph_of(form, context.device)

        result = attempt(ready)
        if not isinstance(result, str):
            errors[name], runs[name] = result
        elif result != "missing: ":
            yield context.row("exposed", name, point, result=result)
    if BASE not in runs:
        return
    times = _in_turn(runs, context)
    for name, mine in times.items():
        extra = [one - base for one, base in zip(mine, times[BASE], strict=True)]
        yield context.row(
            "exposed",
            name,
            point,
            Timing(statistics.median(mine), min(mine), max(mine)),
            extra_us=None if name == BASE else statistics.median(extra),
            error=None if name in (BASE, IN_TURN) else errors[name],
            result="ok",
        )


def _error(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference to the right results, as a share of the largest of a site.

    Raises:
        AssertionError: it is above what the dtype allows.
    """
    worst = 0.0
    for name, wanted in right.items():
        difference = (found[name].double() - wanted.double()).abs().max() / wanted.double().abs().max()
        worst = max(worst, difference.item())
        allowed = TOLERANCE[wanted.dtype]
        assert worst <= allowed, f"{name}: differs by {worst:.2e} of the largest result, allowed {allowed}"
    return worst


def _in_turn(runs: dict[str, Run], context: Context) -> dict[str, list[float]]:
    """Microseconds a layer of each round: differences are taken round by round."""
    num_layers = _NUM_LAYERS if context.device.type == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in runs}
    for one in runs.values():
        one()
    for _ in range(2 * context.repeats):
        for name, one in runs.items():
            times[name].append(time_of(one, context.device) / num_layers)
    return times


def _makers(context: Context, bed: Bed) -> dict[str, Callable[[], Run]]:
    """By name what makes a form; the one that the others are compared with is right behind the base."""
    makers = forms.makers(context.peers)
    found: dict[str, Callable[[], Run]] = {
        BASE: lambda: bed.layers(lambda name, _, weight: lambda: bed.base(name, weight)),
        IN_TURN: lambda: bed.layers(_behind(bed, forms.ours(bed.scene))),
        forms.ONE_ADAPTER: lambda: bed.layers(_behind(bed, forms.one_adapter(bed.scene))),
    }
    if bed.activates:
        found[FUSED] = lambda: bed.layers(_fused(bed), fused=True)
    if not bed.scene.point.is_prefill:
        found[BESIDE] = lambda: bed.layers(_beside(bed))
    found[forms.VLLM] = lambda: bed.layers(_behind(bed, makers[forms.VLLM](bed.scene)))
    found[forms.SGLANG_V2] = lambda: bed.layers(_sglang(bed, context))
    return found


def _behind(bed: Bed, term: Term) -> SiteRun:
    """The term behind the base product."""

    def site_run(name: str, pool: SitePool, weight: torch.Tensor) -> Run:
        add = term(bed.scene.sums[name], bed.scene.x[name], pool)

        def run() -> None:
            bed.base(name, weight)
            add()

        return run

    return site_run


def _beside(bed: Bed) -> SiteRun:
    """Shrink on a stream of its own beside the base product, expand behind both: as the model calls it."""
    from manylora_kernels import gpu  # imports triton, after the interpreter was chosen

    scene = bed.scene

    def site_run(name: str, pool: SitePool, weight: torch.Tensor) -> Run:
        def product(_x: torch.Tensor) -> torch.Tensor:
            return bed.base(name, weight)

        return lambda: gpu.linear_lora(scene.x[name], product, pool, scene.mix, 0)

    return site_run


def _fused(bed: Bed) -> SiteRun:
    """Gate and up together with the activation behind them; other sites as they are best."""
    from manylora_kernels import gpu  # imports triton, after the interpreter was chosen

    scene, one = bed.scene, bed.scene.one_adapter
    other = _behind(bed, forms.ours(scene) if one is None else forms.one_adapter(scene))

    def site_run(name: str, pool: SitePool, weight: torch.Tensor) -> Run:
        if name not in bed.out:
            return other(name, pool, weight)

        def run() -> None:
            y = bed.base(name, weight)
            gpu.add_lora_silu_mul(bed.out[name], y, scene.x[name], pool, scene.mix, 0)

        return run

    return site_run


def _sglang(bed: Bed, context: Context) -> SiteRun:
    """Base and term beside each other, as its own plan says.

    Raises:
        Missing: it cannot be run here.
    """
    if forms.SGLANG_V2 in context.leave_out:
        raise Missing("")
    prepared = peer_sglang.TritonV2(bed.scene, context.peers)

    def site_run(name: str, pool: SitePool, weight: torch.Tensor) -> Run:
        return prepared.with_base(lambda: bed.base(name, weight), bed.scene.x[name], pool)

    return site_run
