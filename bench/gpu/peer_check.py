"""Runs the fetched peers in triton's interpreter: the proof, without a GPU, that they are called rightly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.gpu import peer_sglang, peer_vllm
from bench.gpu.attempt import attempt
from bench.gpu.scene import Scene, Term
from bench.gpu.shapes import LLAMA_LAYER, TINY_LAYER, TINY_POINTS, Point

_WIDE = Point(4, 2, (64,))
"""A pool of a rank that has plans of its own."""
_LONG = Point(520, 3, (16,))
"""Rows of prompts: many for the interpreter, so only the peer that plans by them has them."""


def check(folder: Path) -> int:
    """Try each peer on tiny steps, SGLang's `triton_v2` with the plans that a GPU has for Llama-3-8B, too.

    Returns: 1 if one is missing or wrong.
    """
    status = 0
    for name, point, make in _cases(folder):
        scene = Scene(point, TINY_LAYER, torch.device("cpu"), torch.float16)
        found = attempt(lambda make=make, scene=scene: scene.check(make(scene)))  # type: ignore[misc]
        said = found if isinstance(found, str) else f"ok, error {found:.1e}"
        print(f"{name}, {point.num_rows} rows, {point.num_adapters} x {point.rank_name}: {said}", flush=True)
        status |= isinstance(found, str)
    return status


def _cases(folder: Path) -> list[tuple[str, Point, Callable[[Scene], Term]]]:
    real = {name: LLAMA_LAYER[name] for name in TINY_LAYER}

    def planned(scene: Scene) -> Term:
        return peer_sglang.TritonV2(scene, folder, planned_as=real).term

    found: list[tuple[str, Point, Callable[[Scene], Term]]] = []
    for point in TINY_POINTS:
        found += [
            ("vllm", point, partial(peer_vllm.term, folder=folder)),
            ("vllm, batch invariant", point, partial(peer_vllm.term, folder=folder, batch_invariant=True)),
            ("sglang csgmv", point, partial(peer_sglang.csgmv, folder=folder)),
            ("sglang csgmv, chunks of 128", point, partial(peer_sglang.csgmv, folder=folder, chunk_rows=128)),
            ("sglang triton_v2", point, lambda scene: peer_sglang.TritonV2(scene, folder).term),
        ]
    found += [
        ("sglang triton_v2, plans of Llama-3-8B", point, planned) for point in (*TINY_POINTS, _WIDE, _LONG)
    ]
    return found
