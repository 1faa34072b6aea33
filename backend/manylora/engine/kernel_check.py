"""Compares the adapters' term with its specification before the first request.

Shape key: T rows, K inputs, N outputs of all linears of a site, P pages of the adapter.

A device, driver or compiler that computes otherwise than those that the kernels were tested on would answer
every request with an adapter wrongly, and nobody would notice.
"""

from __future__ import annotations

import numpy as np
import torch
from manylora_kernels import Mix, SitePool, add_lora, reference

from manylora.engine.batch import BatchBuilder
from manylora.engine.trial_adapter import trial_adapter
from manylora.errors import UnsupportedError
from manylora.model.loading import LoadedModel

_SLOTS = (0, -1, 0, 0, -1)
_SCALES = (1.0, 1.0, 0.5, 2.0, 1.0)
_MOST_PAGES = 2
_ALLOWED = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Norm of the error over norm of the term: products and their sums are rounded to the dtype once each."""


@torch.inference_mode()
def prove_kernels(model: LoadedModel, builder: BatchBuilder) -> None:
    """Compute the term of one site of each kind, with random numbers in pages that hold no adapter yet.

    Raises:
        UnsupportedError: the kernels compute something else than `manylora_kernels.reference` on this device.
    """
    for kind, spec in enumerate(model.spec.kinds):
        pool = next(site.pool for site in model.sites if site.kind == kind)
        assert pool is not None, "the pool is given to the sites before"
        error = _error(pool, kind, builder, model.dtype)
        if not error <= _ALLOWED[model.dtype]:
            raise UnsupportedError(
                f"the kernels compute the adapters' term of {spec.name} wrongly on {model.device} with "
                f"{model.dtype}: found an error of {error:.2g} of the term, allowed {_ALLOWED[model.dtype]:g}"
            )


def _error(pool: SitePool, kind: int, builder: BatchBuilder, dtype: torch.dtype) -> float:
    pages = tuple(range(min(_MOST_PAGES, builder.max_pages, pool.a.shape[0])))
    generator = torch.Generator(pool.a.device).manual_seed(kind)
    x = torch.randn(len(_SLOTS), pool.num_inputs, generator=generator, device=pool.a.device).to(dtype)
    # NaN where nothing is to be read or written.
    found = torch.zeros(len(_SLOTS), pool.num_outputs, device=pool.a.device, dtype=dtype)
    without = torch.tensor(_SLOTS, device=pool.a.device) < 0
    found[without] = torch.nan
    mix = Mix.build(
        np.array(_SLOTS, dtype=np.int32),
        np.array(_SCALES, dtype=np.float32),
        [[pages]] * builder.num_kinds,
        builder.max_loras,
        builder.max_pages,
        builder.device,
        triton=builder.triton,
    )
    with trial_adapter([pool], len(pages)):
        add_lora(found, x, pool, mix, kind)
        wanted = torch.zeros_like(found, dtype=torch.float32)
        reference.add_lora(wanted, x, pool, _SLOTS, _SCALES, [pages])
    if not found[without].isnan().all():
        return float("inf")
    found[without] = 0
    return float((found.float() - wanted).norm() / wanted.norm())
