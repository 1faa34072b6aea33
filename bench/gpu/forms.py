"""All the ways to add the adapters' terms that are measured, ours first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from manylora_kernels import SitePool

from bench.gpu import peer_sglang, peer_torch, peer_vllm
from bench.gpu.attempt import NO_MEANING, attempt
from bench.gpu.clock import Run
from bench.gpu.peer_modules import Missing
from bench.gpu.scene import Scene, Term

OURS = "manylora"
ONE_ADAPTER = "manylora, one adapter"
"""A long step of one adapter: the vendor's products on our pages."""
VLLM = "vllm"
SGLANG_V2 = "sglang triton_v2"
SGLANG_CSGMV = "sglang csgmv"
SGLANG_LONG = "sglang csgmv, chunks of 128"
SGLANG = (SGLANG_V2, SGLANG_CSGMV, SGLANG_LONG)
"""Of which the best counts."""
PEERS = (VLLM, "vllm, batch invariant", *SGLANG, "grouped_mm", "per-adapter products")


def ours(scene: Scene) -> Term:
    """`add_lora` with the kernels of this device's plan."""
    from manylora_kernels.lora.triton_form import TRITON  # imports triton, after the interpreter was chosen

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        return lambda: TRITON.add_lora(y, x, pool, scene.mix, 0)

    return build


def one_adapter(scene: Scene) -> Term:
    """What `add_lora` takes for a long step of one adapter outside of graphs.

    Raises:
        Missing: the step is not such a one.
    """
    one = scene.one_adapter
    if one is None:
        raise Missing("")
    return lambda y, x, pool: lambda: one.add_lora(y, x, pool, 0)


def _long_chunks(scene: Scene, folder: Path) -> Term:
    """Its setting for long steps, where it differs from the default.

    Raises:
        Missing: it does not differ, or cannot be run here.
    """
    if scene.point.num_rows < 256:
        raise Missing("")
    return peer_sglang.csgmv(scene, folder, peer_sglang.LONG_CHUNK_ROWS)


def makers(folder: Path) -> dict[str, Callable[[Scene], Term]]:
    """By name what prepares a form for a step.

    Args:
        folder: of the peers' files.
    """
    return {
        OURS: ours,
        ONE_ADAPTER: one_adapter,
        VLLM: lambda scene: peer_vllm.term(scene, folder),
        "vllm, batch invariant": lambda scene: peer_vllm.term(scene, folder, batch_invariant=True),
        SGLANG_V2: lambda scene: peer_sglang.TritonV2(scene, folder).term,
        SGLANG_CSGMV: lambda scene: peer_sglang.csgmv(scene, folder),
        SGLANG_LONG: lambda scene: _long_chunks(scene, folder),
        "grouped_mm": peer_torch.grouped,
        "per-adapter products": peer_torch.per_adapter,
    }


def prepare(
    scene: Scene, folder: Path, leave_out: frozenset[str] = frozenset()
) -> tuple[dict[str, Term], dict[str, str]]:
    """Prepare every form for a step.

    Args:
        leave_out: names of forms that are not wanted.

    Returns:
        The forms, and why others cannot be run, in words; forms that have no meaning for the step are in
        neither.
    """
    found: dict[str, Term] = {}
    others: dict[str, str] = {}
    for name, make in makers(folder).items():
        if name in leave_out:
            continue
        made = attempt(partial(make, scene))
        if not isinstance(made, str):
            found[name] = made
        elif made != NO_MEANING:
            others[name] = made
    return found, others
