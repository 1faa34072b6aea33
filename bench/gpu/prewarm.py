"""Compiles the forms' kernels before anything is timed, in processes side by side.

Triton compiles a kernel at its first launch and keeps it on disk. One process alone would spend most of a
run's time on that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from manylora_kernels import SitePool
from manylora_kernels.streams import side_stream

from bench.gpu import forms, part_model
from bench.gpu.attempt import attempt
from bench.gpu.clock import Run
from bench.gpu.scene import Scene, Term
from bench.gpu.shapes import Layer, Point
from bench.gpu.workers import KILLED_S, Workers

BESIDE, FUSED, SILU_MUL = "beside the base product", "fused with the activation", "activation"
MORE = (BESIDE, FUSED, SILU_MUL)
"""What other parts launch beside the forms."""


@dataclass(frozen=True, slots=True)
class Job:
    """One form at one step."""

    point: Point
    form: str
    layer: Layer
    device: str
    dtype: torch.dtype
    peers: Path


def prewarm(jobs: Sequence[Job], num_processes: int, limit_s: float, model: ModelJob | None = None) -> int:
    """Run each form once, in other processes, until the time is up; one that hangs is killed then.

    Args:
        num_processes: 0: none, and nothing is done.
        model: also make the whole model, in a process beside the others, which ends when the time is up.

    Returns:
        How many jobs were done. What was not, or failed, is compiled, or told of, when it is measured.
    """
    if not num_processes:
        return 0
    end_s = time.monotonic() + limit_s
    beside = None if model is None else get_context("spawn").Process(target=fill_model, args=(model,))
    if beside is not None:
        beside.start()
    workers = Workers(launch, num_processes)
    try:
        return workers.run(jobs, limit_s)
    finally:
        workers.close()
        if beside is not None:
            beside.join(max(0.0, end_s - time.monotonic()))
            # What it has compiled by now is in the caches.
            beside.kill()
            beside.join(KILLED_S)


@dataclass(frozen=True, slots=True)
class ModelJob:
    """The whole model once."""

    device: str
    dtype: torch.dtype
    is_tiny: bool = False


def fill_model(job: ModelJob) -> None:
    """Make the model as its part does, and run a step of prompts: inductor and triton keep what they compile
    on disk."""
    bed = attempt(partial(part_model.make_bed, torch.device(job.device), job.dtype, job.is_tiny))
    if not isinstance(bed, str):
        with torch.inference_mode():
            attempt(partial(bed.run, bed.prefill(24 if job.is_tiny else 512, 2, 2)))


def launch(job: Job) -> bool:
    """Run one form once.

    Returns:
        Whether it ran.
    """
    device = torch.device(job.device)
    with torch.inference_mode():
        ran = attempt(partial(_launch, job, device))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return not isinstance(ran, str)


def _launch(job: Job, device: torch.device) -> None:
    scene = Scene(job.point, job.layer, device, job.dtype, num_layers=1)
    makers = forms.makers(job.peers) | {
        BESIDE: _beside,
        FUSED: _fused,
        SILU_MUL: _silu_mul,
    }
    scene.all_layers(makers[job.form](scene))()


def _beside(scene: Scene) -> Term:
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    side = side_stream(scene.device)
    return lambda y, x, pool: lambda: TRITON.linear_lora(x, lambda _: y, pool, scene.mix, 0, side)


def _fused(scene: Scene) -> Term:
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        def run() -> None:
            if pool.shape.is_gate_up:
                out = y.new_empty(len(y), pool.widths[0])
                TRITON.add_lora_silu_mul(out, y, x, pool, scene.mix, 0)

        return run

    return build


def _silu_mul(_scene: Scene) -> Term:
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    def build(y: torch.Tensor, _x: torch.Tensor, pool: SitePool) -> Run:
        def run() -> None:
            if pool.shape.is_gate_up:
                TRITON.silu_mul(y)

        return run

    return build
