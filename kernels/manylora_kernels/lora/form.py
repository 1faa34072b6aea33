"""The interface that the CPU's and Triton's forms of the adapters' term have in common.

Shape key: T rows, K inputs, N outputs of all linears of a site, D adapters of the step.

`device_form.form_of` chooses one for a device. A form trusts its arguments: `operations` has checked them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from manylora_kernels.lora.pool import SitePool
from manylora_kernels.shapes import ServedShapes

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""x [T, K] -> x W^T + bias, [T, N], of all linears of a site: memory of its own, which may be changed."""

PageTable: TypeAlias = Sequence[Sequence[int]]
"""The pages of each slot in one kind of site."""


class StepMix(Protocol):
    """The adapters of one step as one form reads them."""

    def copy_from(self, other: Any) -> None:
        """Become another step's, of the same form, in place.

        Raises:
            ValueError: a step of other shapes, or a form whose steps cannot be changed.
        """


StepT = TypeVar("StepT", bound=StepMix)


class LoraForm(Protocol[StepT]):
    """The operations of one kind of device. What each computes stands in `operations`."""

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
    ) -> StepT:
        """Lay out a step for the other operations, once for all sites. Arguments as of `Mix.build`.

        Args:
            vectors: for each kind, or empty.
            reads_vectors: by kind, whether an adapter has some, or may have some in a step that this one
                becomes.
        """

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, pool: SitePool, step: StepT, kind: int) -> None:
        """Add the adapters' term of one site to y in place."""

    def add_lora_silu_mul(
        self, out: torch.Tensor, y: torch.Tensor, x: torch.Tensor, pool: SitePool, step: StepT, kind: int
    ) -> None:
        """Compute the activation behind a gate/up site with the adapters' term."""

    def linear_lora(
        self, x: torch.Tensor, product: Product, pool: SitePool, step: StepT, kind: int
    ) -> torch.Tensor:
        """Compute the base product of a site with the adapters' term: [T, N]."""

    def gate_up_lora(
        self, x: torch.Tensor, product: Product, pool: SitePool, step: StepT, kind: int
    ) -> torch.Tensor:
        """Compute a gate/up site with the adapters' term and the activation behind it: [T, N / 2]."""

    def silu_mul(self, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the activation behind a gate/up site without adapters, [T, N / 2], into `out` if given."""

    def warm_up(self, device: torch.device, shapes: ServedShapes | None) -> None:
        """Make what the operations need on a device, so that no step waits for it."""
