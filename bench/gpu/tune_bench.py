"""Checks and times a plan at a site, and compiles plans side by side.

Shape key: T rows, D adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from manylora_kernels import PAGE_ROWS, SitePool, SiteShape
from manylora_kernels.lora.plan import Plan

from bench.gpu import floors, tune_search
from bench.gpu.attempt import attempt
from bench.gpu.clock import Run, graph_of, time_in_turn
from bench.gpu.scene import CACHE_BYTES, Scene, Term
from bench.gpu.shapes import PREFILL_ROWS, Point
from bench.gpu.tune_space import Cell
from bench.gpu.workers import Workers

if TYPE_CHECKING:
    from manylora_kernels.lora.routed import RoutedMix

_MOST_LAYERS = 256
_COMPILE_S = 120.0
"""For the plans of one step of the search, at most."""
DECODE_ADAPTERS = 32
PREFILL_ADAPTERS = 8


def points_of(cell: Cell) -> list[Point]:
    """The steps that a cell's plan is measured at: many adapters, and one, since nobody knows which it will
    be when a plan is chosen."""
    most = PREFILL_ADAPTERS if cell.max_rows >= PREFILL_ROWS else DECODE_ADAPTERS
    counts = dict.fromkeys((min(most, cell.max_rows), 1))
    return [Point(cell.max_rows, count, (PAGE_ROWS * cell.max_pages,)) for count in counts]


class CellBench:
    """The steps of one cell on the device."""

    def __init__(self, cell: Cell, device: torch.device, dtype: torch.dtype, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        layer = {cell.name: cell.site}
        self.scenes = []
        for point in points_of(cell):
            read = floors.weight_bytes(point, layer, dtype.itemsize)
            count = min(_MOST_LAYERS, -(-CACHE_BYTES // read))
            self.scenes.append(Scene(point, layer, device, dtype, num_layers=count))

    @torch.inference_mode()
    def cost(self, plan: Plan) -> float:
        """Microseconds of the site, the mean over the steps; infinite where the plan is wrong or fails."""
        costs = []
        for scene in self.scenes:
            term = term_with(scene.mix, plan)

            def ready(scene: Scene = scene, term: Term = term) -> Run:
                scene.check(term)
                return graph_of(scene.all_layers(term), self.device)

            run = attempt(ready)
            if isinstance(run, str):
                print(f"  {plan}: {run}", flush=True)
                return math.inf
            timing = time_in_turn({"": run}, self.device, self.repeats, len(scene.layers))[""]
            costs.append(timing.median)
        return tune_search.mean(costs)


def term_with(mix: RoutedMix, plan: Plan) -> Term:
    """`add_lora` with a plan of our choice, and a route of its blocks."""
    from manylora_kernels.lora.expand import expand  # imports triton, after the interpreter was chosen
    from manylora_kernels.lora.route import route
    from manylora_kernels.lora.shrink import shrink

    if mix.route.block_rows != plan.block_rows:
        slots = mix.packed[: mix.route.num_rows]
        mix = replace(mix, route=route(slots, mix.route.max_slots, plan.block_rows))
    chained = mix.device.has_dependent_launch

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        def run() -> None:
            h = shrink(x, pool.a, mix, 0, plan, chained)
            expand(y, h, pool.b, pool.widths, mix, 0, plan, chained)

        return run

    return build


def products_against_kernels(
    layer: dict[str, SiteShape], num_rows: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> tuple[float, float]:
    """Microseconds of a layer of one adapter: of the kernels as planned by now, and of plain products."""
    from manylora_kernels.lora.one_adapter import OneAdapter
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    with torch.inference_mode():
        scene = Scene(Point(num_rows, 1, (PAGE_ROWS,)), layer, device, dtype, num_layers=4)
        one = OneAdapter.of(scene.slots, scene.scales, [scene.pages], 1, device)
        assert one is not None, "all rows are of one adapter"
        runs = {
            "kernels": graph_of(
                scene.all_layers(lambda y, x, pool: lambda: TRITON.add_lora(y, x, pool, scene.mix, 0)), device
            ),
            "products": graph_of(
                scene.all_layers(lambda y, x, pool: lambda: one.add_lora(y, x, pool, 0)), device
            ),
        }
        timings = time_in_turn(runs, device, repeats, len(scene.layers))
    return timings["kernels"].median, timings["products"].median


class Compilers:
    """Processes that compile plans into triton's cache on disk, where this process then finds them.

    Args:
        count: 0: none, and plans are compiled when they are first launched.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, str(device)
        self._workers = Workers(compile_plan, count)

    def prepare(self, cell: Cell, plans: Sequence[Plan]) -> None:
        """Compile plans side by side. One that cannot be compiled is told of when it is timed."""
        if len(plans) > 1:
            self._workers.run([(cell, plan, self._dtype, self._device) for plan in plans], _COMPILE_S)

    def close(self) -> None:
        """End the processes."""
        self._workers.close()


def compile_plan(job: tuple[Cell, Plan, torch.dtype, str]) -> None:
    """Launch both kernels of a plan on rows without adapters, whose programs end at once."""
    from manylora_kernels.lora.routed import RoutedMix

    cell, plan, dtype, device_name = job
    device = torch.device(device_name)
    nobody = np.full(cell.max_rows, -1, dtype=np.int32)
    mix = RoutedMix.build(nobody, np.ones(len(nobody), dtype=np.float32), [[]], 1, cell.max_pages, device)
    x = torch.zeros(cell.max_rows, cell.site.num_inputs, dtype=dtype, device=device)
    y = torch.zeros(cell.max_rows, cell.site.num_outputs, dtype=dtype, device=device)
    pool = SitePool(
        torch.zeros(1, cell.site.num_linears, PAGE_ROWS, cell.site.num_inputs, dtype=dtype, device=device),
        torch.zeros(1, PAGE_ROWS, cell.site.num_outputs, dtype=dtype, device=device),
        cell.site.widths,
    )
    attempt(term_with(mix, plan)(y, x, pool))
