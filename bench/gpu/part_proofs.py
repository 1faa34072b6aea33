"""The same bits in every run, rows that do not notice their batch, and the forms that the table has not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from manylora_kernels import SitePool
from manylora_kernels.streams import side_stream

from bench.gpu import proof_attention
from bench.gpu.attempt import attempt
from bench.gpu.budget import Deadline
from bench.gpu.clock import Run, graph_of
from bench.gpu.exposed_bed import Bed
from bench.gpu.proof_attention import bits
from bench.gpu.rows import Context, Row
from bench.gpu.scene import Scene, Term
from bench.gpu.shapes import MIXED, TINY_POINTS, Point

POINTS = {
    "decode": Point(32, 32, (16,)),
    "decode, mixed ranks, half the rows without adapter": Point(64, 32, MIXED, base_share=0.5),
    "prefill, mixed ranks": Point(2048, 8, MIXED),
}
_TINY = {"decode": TINY_POINTS[0], "decode, half the rows without adapter": TINY_POINTS[1]}


_ONE_ADAPTER = Point(2048, 1, (16,))
_TINY_ONE_ADAPTER = Point(5, 1, (16,))
Proof = tuple[str, Callable[[], str], Point | None]


def run(context: Context, deadline: Deadline) -> Iterator[Row]:
    """The proofs, until the time is up."""
    for name, proof, point in _proofs(context):
        if deadline.is_over:
            print(f"proofs: time is up before {name}", flush=True)
            return
        with torch.inference_mode():
            yield context.row("proofs", name, point, result=attempt(proof))


def num_proofs(context: Context) -> int:
    """Of a whole run."""
    return len(list(_proofs(context)))


def _proofs(context: Context) -> Iterator[Proof]:
    points = _TINY if context.is_tiny else POINTS
    for name, point in points.items():
        yield f"{name}: same bits", partial(_repeated, context, point, _ours), point
    point = next(iter(points.values()))
    yield "shrink and expand by themselves", partial(_halves, context, point), point
    yield "shrink beside the base product: same bits", partial(_beside, context, point), point
    yield "fused with the activation: same bits", partial(_fused, context, point), point
    alone = _TINY_ONE_ADAPTER if context.is_tiny else _ONE_ADAPTER
    yield "one adapter, the vendor's products: same bits", partial(_repeated, context, alone, _one), alone
    yield "in a replayed graph: same bits", partial(_repeated, context, point, _replayed), point
    yield "attention, decode: same bits", partial(proof_attention.prove, context, decodes=True), None
    yield "attention, prompts: same bits", partial(proof_attention.prove, context, decodes=False), None


def _one(scene: Scene) -> Term:
    from manylora_kernels.lora.one_adapter import OneAdapter

    # However few rows the scene has.
    one = OneAdapter.of(scene.slots, scene.scales, [scene.pages], 1, scene.device)
    assert one is not None, "all rows are of one adapter"
    return lambda y, x, pool: lambda: one.add_lora(y, x, pool, 0)


def _replayed(scene: Scene) -> Term:
    term = _ours(scene)

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        # What is recorded runs beforehand, and adds up.
        before = y.clone()
        replay = graph_of(term(y, x, pool), scene.device)
        y.copy_(before)
        return replay

    return build


def _ours(scene: Scene) -> Term:
    """Our kernels, also for a scene that the vendor's products would serve."""
    from manylora_kernels.lora.routed import RoutedMix
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    mix = RoutedMix.build(
        scene.slots,
        scene.scales,
        [scene.pages],
        scene.point.num_adapters,
        scene.max_pages,
        scene.device,
    )
    mix = replace(mix, one_adapter=None)
    return lambda y, x, pool: lambda: TRITON.add_lora(y, x, pool, mix, 0)


def _repeated(context: Context, point: Point, make: Callable[[Scene], Term]) -> str:
    """Check against float64, then repeat and compare every bit.

    Raises:
        AssertionError: bits that differ.
    """
    scene = Scene(point, context.layer, context.device, context.dtype, num_layers=1)
    term = make(scene)
    error = scene.check(term)
    steps: list[Callable[[], torch.Tensor]] = []
    for name, pool in scene.layers[0].items():
        y = scene.y[name].clone()
        add = term(y, scene.x[name], pool)

        def step(y: torch.Tensor = y, add: Run = add, before: torch.Tensor = scene.y[name]) -> torch.Tensor:
            y.copy_(before)
            add()
            return y

        steps.append(step)
    return f"{_same_bits(context, steps)}, error {error:.1e}"


def _same_bits(context: Context, steps: list[Callable[[], torch.Tensor]]) -> str:
    """Repeat each and compare every bit of what it returns.

    Raises:
        AssertionError: bits that differ.
    """
    differing = torch.zeros((), dtype=torch.int64, device=context.device)
    for step in steps:
        first = step().clone()
        for _ in range(context.proofs - 1):
            differing += bits(step()).ne(bits(first)).any()
    count = int(differing.item())
    assert count == 0, f"other bits in {count} of {context.proofs * len(steps)} runs"
    return f"same bits {context.proofs} times"


def _beside(context: Context, point: Point) -> str:
    """Shrink on a stream of its own beside the base product: right, and the same bits.

    Raises:
        AssertionError: they are not.
    """
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    bed = Bed.of(point, context)
    scene = bed.scene

    side = side_stream(scene.device)

    def site_run(name: str, pool: SitePool, weight: torch.Tensor) -> Run:
        def product(_x: torch.Tensor) -> torch.Tensor:
            return bed.base(name, weight)

        return lambda: TRITON.linear_lora(scene.x[name], product, pool, scene.mix, 0, side)

    return _bed_repeated(context, bed, bed.layers(site_run))


def _fused(context: Context, point: Point) -> str:
    """The activation in the kernel that adds: right, and the same bits.

    Raises:
        AssertionError: they are not.
    """
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    bed = Bed.of(point, context, activates=True)
    scene = bed.scene

    def site_run(name: str, pool: SitePool, weight: torch.Tensor) -> Run:
        def run() -> None:
            y = bed.base(name, weight)
            if name in bed.out:
                TRITON.add_lora_silu_mul(bed.out[name], y, scene.x[name], pool, scene.mix, 0)
            else:
                TRITON.add_lora(y, scene.x[name], pool, scene.mix, 0)

        return run

    return _bed_repeated(context, bed, bed.layers(site_run, activation=False))


def _bed_repeated(context: Context, bed: Bed, form: Run) -> str:
    """Launched one by one and replayed from a graph: right, and the same bits."""
    bed.fill_with_nan()
    form()
    error = bed.error()

    def step(run: Run) -> torch.Tensor:
        bed.fill_with_nan()
        run()
        return torch.cat([bed.out.get(name, y).flatten() for name, y in bed.scene.sums.items()])

    first = step(form)
    replay = graph_of(form, context.device)
    assert torch.equal(bits(step(replay)), bits(first)), "other bits when it is replayed from a graph"
    said = _same_bits(context, [partial(step, form), partial(step, replay)])
    return f"{said}, replayed too, error {error:.1e}"


def _halves(context: Context, point: Point) -> str:
    """The two halves by themselves are right, and give the bits of the whole.

    Raises:
        AssertionError: they are not.
    """
    from manylora_kernels.lora.expand import expand  # imports triton, after the interpreter was chosen
    from manylora_kernels.lora.shrink import shrink

    scene = Scene(point, context.layer, context.device, context.dtype, num_layers=1)

    def halves(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        plan = scene.mix.plan_for(pool.shape, pool.a.dtype)

        def run() -> None:
            h = shrink(x, pool.a, scene.mix, 0, plan)
            expand(y, h, pool.b, pool.widths, scene.mix, 0, plan)

        return run

    error = scene.check(halves)
    whole = _ours(scene)
    for name, pool in scene.layers[0].items():
        found, wanted = scene.y[name].clone(), scene.y[name].clone()
        halves(found, scene.x[name], pool)()
        whole(wanted, scene.x[name], pool)()
        assert torch.equal(bits(found), bits(wanted)), f"{name}: the halves give other bits"
    return f"same bits as the whole, error {error:.1e}"
