"""vLLM's LoRA kernels on our steps.

Shape key: T rows, D adapters, S linears of a site, R rank of the pool, K inputs, N outputs of all S.

Its layout: of each linear A [D, 1, R, K] and B [D, 1, N_s, R], padded to the pool's rank, the scale in B. Its
metadata is made beforehand; a call is what `PunicaWrapperGPU.add_lora_linear` does: clear, shrink, expand.
"""

from __future__ import annotations

from pathlib import Path

import torch
from manylora_kernels import SitePool

from bench.gpu import peer_modules
from bench.gpu.clock import Run
from bench.gpu.peer_modules import Missing
from bench.gpu.scene import SCALE, Scene, Term

ALLOWED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def pool_rank(wanted: int) -> int:
    """The least rank of a pool that holds `wanted`."""
    return next(rank for rank in ALLOWED_RANKS if rank >= wanted)


def term(scene: Scene, folder: Path, batch_invariant: bool = False) -> Term:
    """Prepare a step.

    Raises:
        Missing: it cannot be run here, or not on this dtype.
    """
    kernels = peer_modules.vllm(folder, batch_invariant)
    if scene.dtype not in (torch.float16, torch.bfloat16):
        raise Missing(f"serves 16-bit types only, not {scene.dtype}")
    num_adapters, num_rows = scene.point.num_adapters, scene.point.num_rows
    meta = kernels.metadata.make(num_adapters, num_rows, scene.device)
    meta.prepare_tensors(torch.from_numpy(scene.slots).to(scene.device))
    # The default: one launch shape for any number of adapters, which a captured graph needs.
    arguments = meta.meta_args(num_rows, specialize_active_lora=False)
    # It keeps pointers by address, and addresses come back when memory does.
    for table in kernels.tables:
        table.clear()
    rank = pool_rank(scene.point.pool_rank)

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        a, b = _weights(scene, pool, rank)
        buffer = torch.empty(len(a), num_rows, rank, dtype=torch.float32, device=scene.device)

        def run() -> None:
            kernels.shrink(x, a, buffer, *arguments, 1.0)
            kernels.expand(buffer, b, y, *arguments, offset_start=0, add_inputs=True)

        return run

    return build


def _weights(scene: Scene, pool: SitePool, rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    num_adapters = scene.point.num_adapters
    a = [pool.a.new_zeros(num_adapters, 1, rank, pool.num_inputs) for _ in pool.widths]
    b = [pool.b.new_zeros(num_adapters, 1, width, rank) for width in pool.widths]
    for d in range(num_adapters):
        mine = scene.point.rank(d)
        parts = (scene.stacked_b(pool, d) * SCALE).split(list(pool.widths), dim=1)
        for s, (a_s, part) in enumerate(zip(scene.stacked_a(pool, d), parts, strict=True)):
            a[s][d, 0, :mine] = a_s
            b[s][d, 0, :, :mine] = part.t()
    return a, b
