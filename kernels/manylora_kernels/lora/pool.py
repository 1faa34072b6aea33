"""One site of one layer in the device pool.

Shape key: P pages, S linears of the site, K inputs, N outputs of all S linears together, 16 rank rows of a
page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from manylora_kernels.shapes import SiteShape

PAGE_ROWS = 16
"""Rank rows of one page."""


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
