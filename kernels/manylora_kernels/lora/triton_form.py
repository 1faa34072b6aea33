"""The form that serves on a GPU: two Triton kernels for each site.

Shape key: T rows, K inputs, N outputs of all linears of the site, Z splits, S linears, R rank rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from manylora_kernels import streams
from manylora_kernels.lora.activation import silu_mul
from manylora_kernels.lora.expand import expand
from manylora_kernels.lora.expand_silu_mul import expand_silu_mul
from manylora_kernels.lora.form import PageTable, Product
from manylora_kernels.lora.plan import Plan
from manylora_kernels.lora.pool import SitePool
from manylora_kernels.lora.precompile import precompile
from manylora_kernels.lora.routed import RoutedMix
from manylora_kernels.lora.shrink import empty_h, shrink
from manylora_kernels.shapes import ServedShapes

MAX_ROWS_BESIDE = 256
"""Up to so many rows of a step, shrink runs beside the base product. With these the product is bound by the
weights' bytes and leaves multiprocessors idle; with more, both compete for them, and a chained launch saves
more. It follows from how many operations a card does per byte, of the order of 300; not measured."""


class TritonForm:
    """The form that serves on CUDA."""

    def prepare(
        self,
        row_slots: npt.NDArray[np.int32],
        row_scales: npt.NDArray[np.float32],
        pages: Sequence[PageTable],
        max_slots: int,
        max_pages: int,
        device: torch.device,
        vectors: Sequence[PageTable],
        reads_vectors: Sequence[bool],
    ) -> RoutedMix:
        """One upload, and a sort on the device."""
        return RoutedMix.build(
            row_slots,
            row_scales,
            pages,
            max_slots,
            max_pages,
            device,
            vectors,
            reads_vectors,
        )

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, pool: SitePool, step: RoutedMix, kind: int) -> None:
        """Shrink and expand, or the vendor's products where the step's one adapter has rows enough."""
        if step.one_adapter is not None and step.one_adapter.serves(y, x, pool):
            step.one_adapter.add_lora(y, x, pool, kind)
            return
        plan = step.plan_for(pool.shape, pool.a.dtype)
        chained = step.device.has_dependent_launch
        h = shrink(x, pool.a, step, kind, plan, chained)
        expand(y, h, pool.b, pool.widths, step, kind, plan, chained, pool.vectors)

    def add_lora_silu_mul(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        x: torch.Tensor,
        pool: SitePool,
        step: RoutedMix,
        kind: int,
    ) -> None:
        """Shrink, and expand with the activation; y is only read."""
        plan = step.plan_for(pool.shape, pool.a.dtype)
        chained = step.device.has_dependent_launch
        h = shrink(x, pool.a, step, kind, plan, chained)
        expand_silu_mul(out, y, h, pool.b, step, kind, plan, chained, pool.vectors)

    def linear_lora(
        self,
        x: torch.Tensor,
        product: Product,
        pool: SitePool,
        step: RoutedMix,
        kind: int,
        side: streams.Streams | None = None,
    ) -> torch.Tensor:
        """Shrink beside the product where `runs_beside` says so.

        Args:
            side: where shrink runs; None: the device's side stream.
        """
        if not runs_beside(step, x.device, side):
            y = product(x)
            self.add_lora(y, x, pool, step, kind)
            return y
        plan = step.plan_for(pool.shape, pool.a.dtype)
        y, h = _product_and_shrink(x, product, pool, step, kind, plan, side)
        expand(y, h, pool.b, pool.widths, step, kind, plan, vectors=pool.vectors)
        return y

    def gate_up_lora(
        self,
        x: torch.Tensor,
        product: Product,
        pool: SitePool,
        step: RoutedMix,
        kind: int,
        side: streams.Streams | None = None,
    ) -> torch.Tensor:
        """As `linear_lora`."""
        if not runs_beside(step, x.device, side):
            y = product(x)
            out = y.new_empty(y.shape[0], pool.widths[0])
            self.add_lora_silu_mul(out, y, x, pool, step, kind)
            return out
        plan = step.plan_for(pool.shape, pool.a.dtype)
        y, h = _product_and_shrink(x, product, pool, step, kind, plan, side)
        out = y.new_empty(y.shape[0], pool.widths[0])
        expand_silu_mul(out, y, h, pool.b, step, kind, plan, vectors=pool.vectors)
        return out

    def silu_mul(self, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """One launch, in float32, rounded once."""
        out = y.new_empty(y.shape[0], y.shape[1] // 2) if out is None else out
        silu_mul(out, y)
        return out

    def warm_up(self, device: torch.device, shapes: ServedShapes | None) -> None:
        """Compiles every kernel that steps of these shapes use; without shapes nothing."""
        if shapes is not None:
            precompile(device, shapes)


TRITON = TritonForm()


def runs_beside(mix: RoutedMix, device: torch.device, side: streams.Streams | None = None) -> bool:
    """Whether shrink runs beside the base product in this step: few rows, and not for the vendor's products,
    which need y. Known from T alone inside a captured graph.

    Not where the host launches one by one, unless it names the stream: fork and join cost it more than a
    chained launch costs the device.
    """
    if mix.route.num_rows > MAX_ROWS_BESIDE or mix.one_adapter is not None:
        return False
    return side is not None or device.type != "cuda" or streams.is_recorded(device)


def _product_and_shrink(
    x: torch.Tensor,
    product: Product,
    pool: SitePool,
    mix: RoutedMix,
    kind: int,
    plan: Plan,
    side: streams.Streams | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    h = empty_h(x.shape[0], len(pool.widths), mix, plan)
    y = streams.run_beside(
        streams.side_stream(x.device) if side is None else side,
        side_work=lambda: shrink(x, pool.a, mix, kind, plan, out=h),
        main_work=lambda: product(x),
    )
    return y, h
