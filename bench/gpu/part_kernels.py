"""Every form at every point: checked against float64, then timed in turn."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from gpu import floors, forms
from gpu.budget import Deadline
from gpu.clock import Run, graph_of, time_in_turn
from gpu.peer_modules import Missing
from gpu.peer_peft import Peft
from gpu.rows import Context, Row
from gpu.scene import Scene, Term
from gpu.shapes import Point

ReadyT = TypeVar("ReadyT")


def run(
    context: Context, deadline: Deadline, points: Iterable[Point], part: str = "kernels"
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
            yield from measure(context, point, part)


def measure(context: Context, point: Point, part: str) -> Iterator[Row]:
    """Check every form at one point, time them in turn, and give a row for each."""
    scene = Scene(point, context.layer, context.device, context.dtype)
    found, missing = forms.prepare(scene, context.peers, context.leave_out)
    for name, why in missing.items():
        yield context.row(part, name, point, result=f"missing: {why}")
    errors: dict[str, float] = {}
    runs: dict[str, Run] = {}
    for name, term in found.items():
        result = attempt(lambda term=term: _ready(scene, term, context))  # type: ignore[misc]
        if isinstance(result, str):
            yield context.row(part, name, point, result=result)
        else:
            errors[name], runs[name] = result
    timings = time_in_turn(runs, context.device, context.repeats, len(scene.layers))
    for name, timing in timings.items():
        yield context.row(
            part,
            name,
            point,
            timing,
            floor_us=floors.floor_us(point, context.layer, context.dtype.itemsize, context.bandwidth),
            moved_bytes=floors.moved_bytes(point, context.layer, context.dtype.itemsize),
            error=errors[name],
            result="ok",
        )


def _ready(scene: Scene, term: Term, context: Context) -> tuple[float, Run]:
    return scene.check(term), graph_of(scene.all_layers(term), context.device)


def attempt(make: Callable[[], ReadyT]) -> ReadyT | str:
    """What it makes, or in words why it cannot: one form's failure must not end the run."""
    try:
        return make()
    except AssertionError as error:
        return f"wrong: {error}"
    except Missing as error:
        return f"missing: {error}"
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


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
