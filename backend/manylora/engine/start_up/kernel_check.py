"""Compares the adapters' term with its specification before the first request.

Shape key: T rows, K inputs, N outputs of all linears of a site, P pages of the adapter.

A device, driver or compiler that computes otherwise than those that the kernels were tested on would answer
every request with an adapter wrongly, and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product

import numpy as np
import torch
from manylora_kernels import Mix, SitePool, add_lora, gate_up_lora, linear_lora, reference
from manylora_kernels.streams import as_recorded

from manylora.engine.start_up.trial_adapter import trial_adapter
from manylora.engine.step_tensors import Uploader
from manylora.errors import UnsupportedError
from manylora.model.loading import LoadedModel

_SLOTS = (0, -1, 1, 0, -1)
_SCALES = (1.0, 1.0, 0.5, 2.0, 1.0)
_MOST_PAGES = 2
_ALLOWED = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Norm of the error over norm of the term: products and their sums are rounded to the dtype once each."""


Form = Callable[[torch.Tensor, torch.Tensor, SitePool, Mix, int], torch.Tensor]
"""Of base products [T, N], x [T, K], the site's pool, the mix and the kind: what the site gives, [T, N], or
behind the activation [T, N / 2]."""


@torch.inference_mode()
def prove_kernels(model: LoadedModel, uploader: Uploader) -> None:
    """Compute the term of one site of each kind, in every form that steps take, with random numbers in pages
    that hold no adapter yet.

    Raises:
        UnsupportedError: the kernels compute something else than `manylora_kernels.reference` on this device.
    """
    for kind, spec in enumerate(model.spec.kinds):
        pool = next(site.pool for site in model.sites if site.kind == kind)
        assert pool is not None, "the pool is given to the sites before"
        forms = {"add_lora": _add, "linear_lora": _linear}
        if pool.shape.is_gate_up:
            forms["gate_up_lora"] = _gate_up
        # Inside of graphs shrink runs beside the base product, by other kernels; each may read vectors.
        options = sorted({False, pool.vectors is not None})
        for name, is_recorded, has_vectors in product(forms, (False, True), options):
            where = " as in graphs" if is_recorded else ""
            with as_recorded() if is_recorded else nullcontext():
                error = _error(forms[name], pool, kind, uploader, model.dtype, has_vectors)
            if error <= _ALLOWED[model.dtype]:
                continue
            what = " and vectors" if has_vectors else ""
            raise UnsupportedError(
                f"the kernels compute the adapters' term{what} of {spec.name} wrongly on {model.device} with "
                f"{model.dtype}: found an error of {error:.2g} of the term by {name}{where}, allowed "
                f"{_ALLOWED[model.dtype]:g}"
            )


def _add(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> torch.Tensor:
    found = y.clone()
    add_lora(found, x, pool, mix, kind)
    return found


def _linear(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> torch.Tensor:
    return linear_lora(x, lambda _: y.clone(), pool, mix, kind)


def _gate_up(y: torch.Tensor, x: torch.Tensor, pool: SitePool, mix: Mix, kind: int) -> torch.Tensor:
    return gate_up_lora(x, lambda _: y.clone(), pool, mix, kind)


def _error(
    form: Form, pool: SitePool, kind: int, uploader: Uploader, dtype: torch.dtype, has_vectors: bool
) -> float:
    """Of what the adapters change, as a share of it. With vectors one of two adapters has some."""
    num_slots = min(2, uploader.max_loras)
    slots = np.minimum(_SLOTS, num_slots - 1).astype(np.int32)
    vectors: list[tuple[int, ...]] = [(0,), ()] if has_vectors else [(), ()]
    pages = tuple(range(min(_MOST_PAGES, uploader.max_pages, pool.a.shape[0])))
    generator = torch.Generator(pool.a.device).manual_seed(kind)

    def randn(num_columns: int) -> torch.Tensor:
        numbers = torch.randn(len(_SLOTS), num_columns, generator=generator, device=pool.a.device)
        return numbers.to(dtype)

    x, y = randn(pool.num_inputs), randn(pool.num_outputs)
    without = torch.from_numpy(slots).to(pool.a.device) < 0
    # NaN where nothing is to be read or written.
    y[without] = torch.nan
    mix = Mix.build(
        slots,
        np.array(_SCALES, dtype=np.float32),
        [[pages] * num_slots] * uploader.num_kinds,
        uploader.max_loras,
        uploader.max_pages,
        uploader.device,
        form=uploader.form,
        vectors=[vectors[:num_slots]] * uploader.num_kinds,
    )
    with trial_adapter([pool], len(pages)):
        found = form(y, x, pool, mix, kind)
        base, whole = (y.to(torch.float32, copy=True) for _ in range(2))
        reference.add_lora(whole, x, pool, slots.tolist(), _SCALES, [pages] * num_slots, vectors)
    if found.shape != whole.shape:
        base, whole = _activated(base), _activated(whole)
    if not found[without].isnan().all():
        return float("inf")
    wrong, term = (found - whole)[~without], (whole - base)[~without]
    return float(wrong.norm() / term.norm())


def _activated(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up
