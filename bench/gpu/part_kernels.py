"""Every form at every point: checked against float64, then timed in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from bench.gpu import floors, forms
from bench.gpu.attempt import attempt, guarded
from bench.gpu.budget import Deadline
from bench.gpu.clock import Run, Timing, graph_of, samples_in_turn, time_in_turn
from bench.gpu.peer_peft import Peft
from bench.gpu.rows import Context, Row
from bench.gpu.scene import Scene, Term
from bench.gpu.shapes import Point

KERNELS = "kernels"
"""Ours and the peers."""
ALONE = "kernels alone"
"""Ours before any peer has run in this process: one that writes where it must not ends all that follows."""
POOL_RANK = "pool rank"


def run(
    context: Context,
    deadline: Deadline,
    points: Iterable[Point],
    part: str = KERNELS,
    leave_out: Iterable[str] = (),
) -> Iterator[Row]:
    """The rows of the points until the time is up; a point that comes twice is measured once."""
    seen: set[Point] = set()
    for point in points:
        if point in seen:
            continue
        if deadline.is_over:
            print(f"{part}: time is up before {point}", flush=True)
            return
        seen.add(point)
        with torch.inference_mode():
            yield from guarded(
                measure(context, point, part, context.leave_out | frozenset(leave_out)),
                lambda why, point=point: context.row(part, forms.OURS, point, result=why),  # type: ignore[misc]
            )


def measure(context: Context, point: Point, part: str, leave_out: frozenset[str]) -> Iterator[Row]:
    """Check every form at one point, time them in turn, and give a row for each."""
    scene = Scene(point, context.layer, context.device, context.dtype)
    found, others = forms.prepare(scene, context.peers, leave_out)
    for name, why in others.items():
        yield context.row(part, name, point, result=why)
    errors: dict[str, float] = {}
    runs: dict[str, Run] = {}
    for name, term in found.items():
        result = attempt(partial(_ready, scene, term, context))
        if isinstance(result, str):
            yield context.row(part, name, point, result=result)
        else:
            errors[name], runs[name] = result
    timings = time_in_turn(runs, context.device, context.repeats, len(scene.layers))
    for name, timing in timings.items():
        yield _timed(context, part, name, point, timing, errors[name])


def pool_rank(context: Context, points: Iterable[Point]) -> Iterator[Row]:
    """Our form at the same step in several pools, all of them in turn."""
    errors: dict[Point, float] = {}
    runs: dict[str, Run] = {}
    counts: dict[str, float] = {}
    by_name = {str(point): point for point in points}
    with torch.inference_mode():
        for name, point in by_name.items():
            scene = Scene(point, context.layer, context.device, context.dtype)
            result = attempt(partial(_ready, scene, forms.ours(scene), context))
            if isinstance(result, str):
                yield context.row(POOL_RANK, forms.OURS, point, result=result)
            else:
                errors[point], runs[name] = result
                counts[name] = len(scene.layers)
        samples = samples_in_turn(runs, context.device, 2 * context.repeats, counts)
    for name, mine in samples.items():
        point = by_name[name]
        yield _timed(context, POOL_RANK, forms.OURS, point, Timing.of(mine), errors[point])


def _timed(context: Context, part: str, form: str, point: Point, timing: Timing, error: float) -> Row:
    return context.row(
        part,
        form,
        point,
        timing,
        floor_us=floors.floor_us(point, context.layer, context.dtype.itemsize, context.bandwidth),
        moved_bytes=floors.moved_bytes(point, context.layer, context.dtype.itemsize),
        error=error,
        result="ok",
    )


def _ready(scene: Scene, term: Term, context: Context) -> tuple[float, Run]:
    """Compare the first layer with float64, and all layers from a graph with the same one by one."""
    error = scene.check(term)
    run = scene.all_layers(term)
    replay = graph_of(run, context.device)
    scene.check_replay(run, replay)
    return error, replay


def peft(context: Context, point: Point) -> Iterator[Row]:
    """PEFT's mixed batch at one point, base product included, beside the base product alone."""
    with torch.no_grad():
        scene = Scene(point, context.layer, context.device, context.dtype, num_layers=1)
        made: list[Peft] = []

        def ready() -> tuple[float, Run]:
            made.append(Peft(scene))
            return made[0].check(), made[0].run

        result = attempt(ready)
        if isinstance(result, str):
            yield context.row("peft", "peft", point, result=result)
            return
        error, whole = result
        base = made[0].base()
        timings = time_in_turn({"peft": whole, "base": base}, context.device, context.repeats)
        extra = timings["peft"].median - timings["base"].median
        yield context.row("peft", "base, as it runs", point, timings["base"])
        yield context.row(
            "peft", "peft, with base", point, timings["peft"], extra_us=extra, error=error, result="ok"
        )
