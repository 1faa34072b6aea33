"""SGLang's LoRA kernels on our steps: `triton_v2`, its best, and `csgmv`, its default.

Shape key: T rows, D adapters, S linears of a site, R rank of the pool, K inputs, N outputs of all S.

Its layout: A [D, S * R, K], linear s of an adapter of rank r at rows s * r, and B [D, N, R]. Routes and
segments are made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from manylora_kernels import SitePool

from bench.gpu import peer_modules
from bench.gpu.clock import Run
from bench.gpu.peer_modules import Batch
from bench.gpu.scene import SCALE, Scene, Term
from bench.gpu.shapes import Layer

CHUNK_ROWS = 16
"""The default of `--max-lora-chunk-size`."""
LONG_CHUNK_ROWS = 128


class TritonV2:
    """A step prepared for the `triton_v2` backend, with its own table of plans.

    Args:
        planned_as: of each site the shape that its plan is looked up with; None: its own. So a GPU's plans
            can be tried on small tensors.

    Raises:
        Missing: it cannot be run here.
    """

    def __init__(self, scene: Scene, folder: Path, planned_as: Layer | None = None) -> None:
        self.planned_as = {scene.layer[name]: site for name, site in (planned_as or {}).items()}
        self.scene, self.kernels = scene, peer_modules.sglang(folder)
        if scene.device.type != "cuda":
            self.kernels.runner.slice_geometry = lambda *args: _geometry_on_cpu(self.kernels, *args)
        workspace = self.kernels.workspace.LoraWorkspace()
        # Its scratch and its routes are by stream; what is captured must find what was prepared.
        workspace._caller = lambda _device: 0
        num_adapters, phases = scene.point.num_adapters, self.kernels.Phase
        self.runner = self.kernels.runner.DenseLoraRunner(
            workspace,
            max_loras=num_adapters,
            device=scene.device,
            architecture=None if scene.device.type == "cuda" else "sm90",
        )
        self.runner.begin_batch(
            token_slots=torch.from_numpy(scene.slots).to(scene.device),
            lora_ranks=torch.tensor(scene.ranks(), dtype=torch.int32, device=scene.device),
            scalings=torch.full((num_adapters,), SCALE, device=scene.device),
            num_tokens=scene.point.num_rows,
            phase=phases.PREFILL if scene.point.is_prefill else phases.DECODE,
            graph_mode=True,
        )

    def term(self, y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        """Shrink, then expand into y."""
        a, b, offsets, plan = self._site(pool)

        def run() -> None:
            bridge = self.runner.run_a(x, a, stack=len(pool.widths), plan=plan)
            self.runner.run_b(bridge, b, y, offsets=offsets, plan=plan)

        return run

    def with_base(self, base: Callable[[], torch.Tensor], x: torch.Tensor, pool: SitePool) -> Run:
        """The base product, which `base` returns, and the term, beside it if the plan says so."""
        a, b, offsets, plan = self._site(pool)
        return lambda: self.runner.apply(x, base, plan, a=a, b=b, offsets=offsets)

    def _site(self, pool: SitePool) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...], Any]:
        a, b = _weights(self.scene, pool)
        offsets = (0, *accumulate(pool.widths))
        site = self.planned_as.get(pool.shape, pool.shape)
        plan = self.runner.plan_for(
            self.kernels.plan.DenseLoraKind.LINEAR,
            b.shape[2],
            site.num_inputs,
            site.num_outputs,
            num_tokens=self.scene.point.num_rows,
        )
        return a, b, offsets, plan


def csgmv(scene: Scene, folder: Path, chunk_rows: int = CHUNK_ROWS) -> Term:
    """Prepare a step for the `csgmv` backend.

    Raises:
        Missing: it cannot be run here.
    """
    kernels = peer_modules.sglang(folder)
    batch = batch_of(scene, kernels.Batch, chunk_rows)

    def build(y: torch.Tensor, x: torch.Tensor, pool: SitePool) -> Run:
        a, b = _weights(scene, pool)
        on_host = torch.tensor([0, *accumulate(pool.widths)], dtype=torch.int32)
        on_device, widest = on_host.to(scene.device), max(pool.widths)

        def run() -> None:
            h = kernels.shrink(x, a, batch, len(pool.widths))
            kernels.expand(h, b, batch, on_device, widest, y, on_host)

        return run

    return build


def batch_of(scene: Scene, batch: type[Batch], chunk_rows: int) -> Batch:
    """Rows by slot, cut into segments of at most `chunk_rows`; rows without an adapter are in none."""
    order = np.argsort(scene.slots, kind="stable")
    order = order[scene.slots[order] >= 0]
    starts, owners = [0], []
    for slot in np.unique(scene.slots[order]).tolist():
        count = int((scene.slots == slot).sum())
        for begin in range(0, count, chunk_rows):
            owners.append(slot)
            starts.append(starts[-1] + min(chunk_rows, count - begin))

    def on_device(values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values)).to(scene.device, dtype)

    return batch(
        use_cuda_graph=False,
        num_segments=len(owners),
        seg_indptr=on_device(starts, torch.int32),
        weight_indices=on_device(owners, torch.int32),
        lora_ranks=on_device(scene.ranks(), torch.int32),
        scalings=torch.full((scene.point.num_adapters,), SCALE, device=scene.device),
        permutation=on_device(order, torch.int32),
        max_len=chunk_rows,
    )


def _weights(scene: Scene, pool: SitePool) -> tuple[torch.Tensor, torch.Tensor]:
    num_adapters, rank, num_linears = scene.point.num_adapters, scene.point.pool_rank, len(pool.widths)
    a = pool.a.new_zeros(num_adapters, num_linears * rank, pool.num_inputs)
    b = pool.b.new_zeros(num_adapters, pool.num_outputs, rank)
    for d in range(num_adapters):
        mine = scene.point.rank(d)
        a[d, : num_linears * mine] = scene.stacked_a(pool, d).flatten(0, 1)
        b[d, :, :mine] = scene.stacked_b(pool, d).t()
    return a, b


def _geometry_on_cpu(
    kernels: SimpleNamespace, offsets: tuple[int, ...], tile: int, device: torch.device
) -> Any:
    """The slices of a site in SGLang's terms, whose own function asks for a CUDA device."""
    widths = [end - begin for begin, end in pairwise(offsets)]
    uniform = widths[0] if len(set(widths)) == 1 else 0
    return kernels.lora_b.SliceGeometry(
        slice_offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        out_offsets=torch.tensor(offsets[:-1], dtype=torch.int32, device=device),
        num_slices=len(widths),
        num_column_tiles=sum(-(-width // tile) for width in widths),
        uniform_width=uniform,
        out_stride=uniform,
        full_tiles=all(width % tile == 0 for width in widths),
        block_size_n=tile,
    )
