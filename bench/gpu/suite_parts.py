"""The parts of a run of `gpu_suite.py`, and what they need compiled.

What the functions import imports triton, so the interpreter must be chosen before they are called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from bench.gpu.budget import Deadline

if TYPE_CHECKING:
    from bench.gpu import shapes
    from bench.gpu.goals import Whole
    from bench.gpu.rows import Context, Row

SHARES = {
    "goals": 30,
    "exposed": 45,
    "pool-rank": 10,
    "copy": 20,
    "model": 30,
    "peers": 90,
    "proofs": 50,
    "exposed-peers": 25,
    "table": 100,
}
"""The parts in their order, and the share of each in a run's time."""
RESERVED_S = {"model": 110.0}
"""Beside the share: the model is made, compiled and recorded before its first step."""
QUICK = ("goals", "exposed", "pool-rank")

Part = Callable[["Context", Deadline], Iterator["Row"]]


def parts() -> dict[str, Part]:
    """By name."""
    from bench.gpu import forms, part_copy, part_exposed, part_kernels, part_model, part_proofs, shapes

    def points(context: Context, of_gpu: Iterable[shapes.Point]) -> Iterable[shapes.Point]:
        return shapes.TINY_POINTS if context.is_tiny else of_gpu

    def goals(context: Context, deadline: Deadline) -> Iterator[Row]:
        chosen = points(context, shapes.GOAL_POINTS)
        yield from part_kernels.run(context, deadline, chosen, part_kernels.ALONE, forms.PEERS)

    def pool_rank(context: Context, deadline: Deadline) -> Iterator[Row]:
        yield from part_kernels.pool_rank(context, points(context, shapes.POOL_RANK_POINTS))

    def peers(context: Context, deadline: Deadline) -> Iterator[Row]:
        yield from part_kernels.run(context, deadline, points(context, shapes.COMPARED_POINTS))

    def table(context: Context, deadline: Deadline) -> Iterator[Row]:
        rest = [point for point in shapes.few_points() if point not in shapes.COMPARED_POINTS]
        peft = shapes.TINY_POINTS[0] if context.is_tiny else shapes.GOAL_POINTS[0]
        yield from part_kernels.peft(context, peft)
        yield from part_kernels.run(context, deadline, [] if context.is_tiny else rest)

    return {
        "goals": goals,
        "exposed": part_exposed.run,
        "pool-rank": pool_rank,
        "copy": part_copy.run,
        "model": part_model.run,
        "peers": peers,
        "proofs": part_proofs.run,
        "exposed-peers": part_exposed.run_with_peers,
        "table": table,
    }


def whole_run(context: Context) -> Whole:
    """What a whole run has."""
    from bench.gpu import forms, part_exposed, part_kernels, part_proofs, shapes
    from bench.gpu.goals import Whole

    num_proofs, read = part_proofs.num_proofs(context), context.bandwidth.read
    if not context.is_tiny:
        return Whole(num_proofs=num_proofs, read=read)
    checked = [(part_exposed.PART, part_exposed.IN_TURN, shapes.TINY_POINTS[0])]
    for part in (part_kernels.ALONE, part_kernels.KERNELS):
        checked += [(part, forms.OURS, point) for point in shapes.TINY_POINTS]
    return Whole(num_proofs=num_proofs, compared=shapes.TINY_POINTS, checked=tuple(checked), read=read)


def compile_all(context: Context, chosen: Sequence[str], num_processes: int, limit_s: float) -> None:
    """Have the kernels of the parts' points compiled, so that the time goes into measuring."""
    from bench.gpu import prewarm

    jobs = [
        prewarm.Job(point, name, context.layer, context.device.type, context.dtype, context.peers)
        for point, name in dict.fromkeys(_compiled(context, chosen))
        if name not in context.leave_out
    ]
    model = prewarm.ModelJob(context.device.type, context.dtype, context.is_tiny)
    begin = time.monotonic()
    done = prewarm.prewarm(jobs, num_processes, limit_s, model if "model" in chosen else None)
    seconds = time.monotonic() - begin
    print(f"# compiled beforehand: {done} of {len(jobs)} forms at points, {seconds:.0f} s", flush=True)


def _compiled(context: Context, chosen: Sequence[str]) -> Iterator[tuple[shapes.Point, str]]:
    """Points and forms, in the order in which they are measured."""
    from bench.gpu import forms, part_exposed, part_proofs, prewarm, shapes

    names = list(forms.makers(context.peers))
    ours = [name for name in names if name not in forms.PEERS]

    def of(
        part: str, points: Iterable[shapes.Point], forms_of: Iterable[str]
    ) -> Iterator[tuple[shapes.Point, str]]:
        if part in chosen:
            used = shapes.TINY_POINTS if context.is_tiny else points
            yield from ((point, name) for point in used for name in forms_of)

    yield from of("goals", shapes.GOAL_POINTS, ours)
    yield from of("exposed", part_exposed.POINTS, (*ours, *prewarm.MORE))
    yield from of("pool-rank", shapes.POOL_RANK_POINTS, ours)
    yield from of("peers", shapes.COMPARED_POINTS, names)
    yield from of("proofs", part_proofs.POINTS.values(), (*ours, *prewarm.MORE))
    yield from of("exposed-peers", part_exposed.POINTS, (forms.VLLM, forms.SGLANG_V2))
    yield from of("table", shapes.few_points(), names)
