"""Random numbers in pages that hold no adapter yet, for the comparisons at start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from manylora_kernels import SitePool


@contextmanager
def trial_adapter(pools: Sequence[SitePool], num_pages: int) -> Iterator[None]:
    """Have an adapter that changes much in the first `num_pages` pages of these sites; zeros again behind it.

    Args:
        pools: sites of one device, at least one.
        num_pages: no more than each has. As many pages of vectors, if the sites have so many.
    """
    mine = slice(0, num_pages)
    for pool in pools:
        generator = torch.Generator(pool.a.device).manual_seed(pool.num_inputs)
        pool.a[mine].normal_(0, pool.num_inputs**-0.5, generator=generator)
        pool.b[mine].normal_(0, 0.25, generator=generator)
        if pool.vectors is not None:
            pool.vectors.scale[mine].normal_(1, 0.25, generator=generator)
            pool.vectors.offset[mine].normal_(0, 0.25, generator=generator)
    try:
        yield
    finally:
        for pool in pools:
            parts = (pool.a, pool.b, pool.scale, pool.offset)
            for part in (part for part in parts if part is not None):
                part[mine].zero_()
        if pools[0].a.device.type == "cuda":
            # Adapters are copied on a stream of their own, which knows nothing of this.
            torch.cuda.synchronize(pools[0].a.device)
