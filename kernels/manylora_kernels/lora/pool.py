"""One site of one layer in the device pool.

Shape key: P pages, S linears of the site, K inputs, N outputs of all S linears together, 16 rank rows of a
page, V pages of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from manylora_kernels.shapes import SiteShape

PAGE_ROWS = 16
"""Rank rows of one page."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """What adapters have once for each output of a site: `y = scale * (base output + term) + offset`."""

    scale: torch.Tensor
    """[V, N], each page contiguous."""
    offset: torch.Tensor
    """[V, N], the same strides."""


@dataclass(frozen=True, slots=True, eq=False)
class SitePool:
    """The adapter weights of one site, in pages. Views of a pool of all layers; rows past a true rank are
    zero.

    Rank row j of linear s of an adapter with the pages `p` lies at `a[p[j // 16], s, j % 16]` and, for its
    outputs, at `b[p[j // 16], j % 16, offset_s : offset_s + widths[s]]`.

    Raises:
        ValueError: shapes, strides, dtypes or devices that do not belong together.
    """

    a: torch.Tensor
    """[P, S, 16, K], each page contiguous."""
    b: torch.Tensor
    """[P, 16, N], each page contiguous: the outputs of the linears side by side."""
    widths: tuple[int, ...]
    """Outputs of each of the S linears; their sum is N."""
    scale: torch.Tensor | None = None
    """[V, N], each page contiguous; None in a pool without vectors."""
    offset: torch.Tensor | None = None
    """[V, N], the same."""
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What a form has made of these tensors once, under its own name."""

    def __post_init__(self) -> None:
        a, b = self.a, self.b
        num_linears, num_outputs = len(self.widths), sum(self.widths)
        if a.dim() != 4 or a.shape[1:3] != (num_linears, PAGE_ROWS):
            raise ValueError(
                f"a of {num_linears} linears: found {list(a.shape)}, allowed [P, {num_linears}, 16, K]"
            )
        if b.shape != (a.shape[0], PAGE_ROWS, num_outputs):
            raise ValueError(
                f"b of widths {self.widths}: found {list(b.shape)}, allowed [{a.shape[0]}, 16, {num_outputs}]"
            )
        if a.dtype != b.dtype or a.device != b.device:
            raise ValueError(
                f"a and b: found {a.dtype} on {a.device} and {b.dtype} on {b.device}, "
                "allowed one dtype on one device"
            )
        for name, tensor in (("a", a), ("b", b)):
            if tensor.shape[0] and not tensor[0].is_contiguous():
                raise ValueError(
                    f"{name}: found page strides {tensor.stride()[1:]}, allowed contiguous pages"
                )

        self._check_vectors()

    def _check_vectors(self) -> None:
        a, num_outputs = self.a, self.num_outputs
        if self.scale is None and self.offset is None:
            return
        for name, vector in (("scale", self.scale), ("offset", self.offset)):
            if vector is None or vector.dim() != 2 or vector.shape[1] != num_outputs:
                found = None if vector is None else list(vector.shape)
                raise ValueError(f"{name}: found {found}, allowed [V, {num_outputs}], or neither of the two")
            if vector.dtype != a.dtype or vector.device != a.device:
                raise ValueError(
                    f"{name}: found {vector.dtype} on {vector.device}, allowed {a.dtype} on {a.device}"
                )
            if vector.stride() != (num_outputs, 1):
                raise ValueError(f"{name}: found strides {vector.stride()}, allowed {(num_outputs, 1)}")
        assert self.scale is not None
        assert self.offset is not None
        if self.scale.shape != self.offset.shape:
            raise ValueError(
                f"scale and offset: found {list(self.scale.shape)} and {list(self.offset.shape)}, "
                "allowed the same"
            )

    @property
    def vectors(self) -> Vectors | None:
        """Scale and offset; None in a pool without them."""
        if self.scale is None or self.offset is None:
            return None
        return Vectors(self.scale, self.offset)

    @property
    def num_vectors(self) -> int:
        """V; 0 in a pool without vectors."""
        return 0 if self.scale is None else self.scale.shape[0]

    @property
    def shape(self) -> SiteShape:
        """The sizes of the site."""
        return SiteShape(self.num_inputs, self.widths)

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.a.shape[3]

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.b.shape[2]
