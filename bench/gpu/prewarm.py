"""Compiles the forms' kernels before anything is timed, in processes side by side.

Triton compiles a kernel at its first launch and keeps it on disk. One process alone would spend most of a
run's time on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from gpu import forms
from gpu.part_kernels import attempt
from gpu.scene import Scene
from gpu.shapes import Layer, Point


@dataclass(frozen=True, slots=True)
class Job:
    """One form at one step."""

    point: Point
    form: str
    layer: Layer
    device: str
    dtype: torch.dtype
    peers: Path


def prewarm(jobs: Sequence[Job], num_processes: int, limit_s: float) -> int:
    """Run each form once, in other processes, until the time is up.

    Args:
        num_processes: 0: none, and nothing is done.

    Returns:
        How many jobs were done. What was not, or failed, is compiled, or told of, when it is measured.
    """
    if not num_processes:
        return 0
    pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))
    try:
        done, _ = wait([pool.submit(launch, job) for job in jobs], limit_s)
        return sum(future.exception() is None and future.result() for future in done)
    finally:
        pool.shutdown(cancel_futures=True)


def launch(job: Job) -> bool:
    """Run one form once.

    Returns:
        Whether it ran.
    """
    device = torch.device(job.device)
    with torch.inference_mode():
        scene = Scene(job.point, job.layer, device, job.dtype, num_layers=1)
        found = attempt(partial(forms.makers(job.peers)[job.form], scene))
        ran = found if isinstance(found, str) else attempt(scene.all_layers(found))
        del scene, found
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return not isinstance(ran, str)
