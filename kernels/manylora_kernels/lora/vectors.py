"""The end of expand for adapters that have vectors: a factor and an addend for each output of a site.

Shape key: T rows, N outputs of all linears of the site, V pages of vectors.

An option of both kernels of expand, which is compiled away in steps whose adapters have none: those launch
what they launched before there were any.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from manylora_kernels.lora.pool import Vectors
from manylora_kernels.lora.routed import RoutedMix


def vector_arguments(vectors: Vectors | None, mix: RoutedMix, kind: int) -> dict[str, Any]:
    """What the kernel is handed of vectors: nothing in a step that reads none in this kind."""
    if vectors is None or not mix.reads_vectors[kind]:
        names = ("vectors_ptr", "vector_scale_ptr", "vector_offset_ptr")
        return {"READS_VECTORS": False, **dict.fromkeys(names)}
    return {
        "READS_VECTORS": True,
        "vectors_ptr": mix.vectors[kind],
        "vector_scale_ptr": vectors.scale,
        "vector_offset_ptr": vectors.offset,
    }


@triton.jit
def apply_vectors(y, scale_ptr, offset_ptr, start, offs_n, mask_n):
    """`scale * y + offset` of one tile in float32, of the vectors that begin at `start`."""
    scale = tl.load(scale_ptr + start + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    offset = tl.load(offset_ptr + start + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    return y * scale[None, :] + offset[None, :]
