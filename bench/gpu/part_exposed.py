"""What adapters add to a layer's base products, in one captured graph of both.

Shape key: T rows, K inputs, N outputs of all linears of a site.

The base of a layer is the product of each site, and for prompts also the activation behind gate and up, by
the kernel that the model has for it. A form of the products alone is what shares of the base are taken of.
Every form is compared with float64, replayed from its graph as well, and first the one that others build on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from manylora_kernels import SitePool
from manylora_kernels.streams import side_stream

from bench.gpu import forms, peer_sglang
from bench.gpu.attempt import NO_MEANING, attempt, guarded
from bench.gpu.budget import Deadline
from bench.gpu.clock import Run, Timing, graph_of, samples_in_turn
from bench.gpu.exposed_bed import NUM_LAYERS, Bed, SiteRun
from bench.gpu.peer_modules import Missing
from bench.gpu.rows import Context, Row
from bench.gpu.scene import Term
from bench.gpu.shapes import TINY_POINTS, Point

PART = "exposed"
BASE = "base"
LINEARS = "base, linears only"
IN_TURN = "manylora, in turn"
BESIDE = "manylora, shrink beside the base"
FUSED = "manylora, fused with the activation"
DECODE_POINTS = (Point(32, 1, (16,)), Point(1, 1, (16,)), Point(8, 1, (16,)))
PREFILL_POINT = Point(8192, 1, (16,))
POINTS = (*DECODE_POINTS, PREFILL_POINT, Point(32, 32, (16,)), Point(64, 64, (64,)))


def run(context: Context, deadline: Deadline) -> Iterator[Row]:
    """The rows of the points until the time is up, of our forms."""
    yield from _run(context, deadline, with_peers=False)


def run_with_peers(context: Context, deadline: Deadline) -> Iterator[Row]:
    """The same with the peers beside ours, as a part of its own."""
    yield from _run(context, deadline, with_peers=True)


def _run(context: Context, deadline: Deadline, with_peers: bool) -> Iterator[Row]:
    part = f"{PART}, with peers" if with_peers else PART
    for point in TINY_POINTS[:1] if context.is_tiny else POINTS:
        if deadline.is_over:
            print(f"{part}: time is up before {point}", flush=True)
            return
        with torch.inference_mode():
            yield from guarded(
                measure(context, point, part, with_peers),
                lambda why, point=point: context.row(part, IN_TURN, point, result=why),  # type: ignore[misc]
            )


def measure(context: Context, point: Point, part: str, with_peers: bool) -> Iterator[Row]:
    """Compare one point's forms with float64, then time them in turn."""
    bed = Bed.of(point, context)
    runs: dict[str, Run] = {}
    errors: dict[str, float | None] = {}
    for name, make in _makers(context, bed, with_peers).items():
        if name in context.leave_out:
            continue
        result = attempt(partial(_ready, context, bed, make, is_base=name in (BASE, LINEARS)))
        if not isinstance(result, str):
            errors[name], runs[name] = result
        elif result != NO_MEANING:
            yield context.row(part, name, point, result=result)
        if name in (BASE, IN_TURN) and name not in runs:
            # The others are nothing without these.
            return
    samples = samples_in_turn(
        runs, context.device, 2 * context.repeats, dict.fromkeys(runs, _num_layers(context))
    )
    for name, mine in samples.items():
        # Differences are taken round by round.
        extra = [one - base for one, base in zip(mine, samples[BASE], strict=True)]
        yield context.row(
            part,
            name,
            point,
            Timing.of(mine),
            extra_us=None if name in (BASE, LINEARS) else statistics.median(extra),
            error=errors[name],
            result="ok",
        )


def _ready(context: Context, bed: Bed, make: Callable[[], Run], *, is_base: bool) -> tuple[float | None, Run]:
    """Compare what a form gives, launched one by one and from its graph, with float64."""
    form = make()
    run = graph_of(form, context.device)
    errors = []
    for launch in (form, run):
        bed.fill_with_nan()
        launch()
        bed.check_written()
        if not is_base:
            errors.append(bed.error())
    return max(errors, default=None), run


def _num_layers(context: Context) -> float:
    return NUM_LAYERS if context.device.type == "cuda" else 1


def _makers(context: Context, bed: Bed, with_peers: bool) -> dict[str, Callable[[], Run]]:
    """By name what makes a form; the base first, then the one that the others are nothing without."""
    makers = forms.makers(context.peers)

    def base(name: str, _: SitePool, weight: torch.Tensor) -> Run:
        return lambda: bed.base(name, weight)

    found: dict[str, Callable[[], Run]] = {
        BASE: lambda: bed.layers(base),
        IN_TURN: lambda: bed.layers(_behind(bed, forms.ours(bed.scene))),
    }
    if with_peers:
        found[forms.VLLM] = lambda: bed.layers(_behind(bed, makers[forms.VLLM](bed.scene)))
        found[forms.SGLANG_V2] = lambda: bed.layers(_sglang(bed, context))
        return found
    found[forms.ONE_ADAPTER] = lambda: bed.layers(_behind(bed, forms.one_adapter(bed.scene)))
    if bed.activates:
        found[LINEARS] = lambda: bed.layers(base, activation=False)
        found[FUSED] = lambda: bed.layers(_fused(bed), activation=False)
    if not bed.scene.point.is_prefill:
        found[BESIDE] = lambda: bed.layers(_beside(bed))
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
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    scene = bed.scene

    def site_run(name: str, pool: SitePool, weight: torch.Tensor) -> Run:
        def product(_x: torch.Tensor) -> torch.Tensor:
            return bed.base(name, weight)

        side = side_stream(scene.device)
        return lambda: TRITON.linear_lora(scene.x[name], product, pool, scene.mix, 0, side)

    return site_run


def _fused(bed: Bed) -> SiteRun:
    """Gate and up together with the activation behind them; other sites as they are best."""
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    scene, one = bed.scene, bed.scene.one_adapter
    other = _behind(bed, forms.ours(scene) if one is None else forms.one_adapter(scene))

    def site_run(name: str, pool: SitePool, weight: torch.Tensor) -> Run:
        if name not in bed.out:
            return other(name, pool, weight)

        def run() -> None:
            y = bed.base(name, weight)
            TRITON.add_lora_silu_mul(bed.out[name], y, scene.x[name], pool, scene.mix, 0)

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
