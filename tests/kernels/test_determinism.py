"""The same bits in every run, and, where asked for, whatever else is in the batch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from manylora_kernels import SitePool
from manylora_kernels.lora.routed import RoutedMix
from manylora_kernels.lora.triton_form import TRITON

REPEATS = 3 if os.environ.get("TRITON_INTERPRET") == "1" else 100
K, WIDTHS, SCALE = 80, (48, 24), 0.75
PAGES: tuple[tuple[int, ...], ...] = ((2,), (0, 3), (4, 1, 5))


class Site:
    """A site with three adapters of one to three pages, and a row whose neighbours change."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(5)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.device = torch.device(device)
        self.pool = SitePool(randn(6, 2, 16, K), randn(6, 16, sum(WIDTHS)), WIDTHS)
        self.x, self.y = randn(600, K), randn(600, sum(WIDTHS))

    def run(self, slots: list[int], row: int, rows: list[int]) -> torch.Tensor:
        """The result of one row: `rows` of x and y in this order, of the adapters `slots`."""
        mix = RoutedMix.build(
            np.array(slots, dtype=np.int32),
            np.full(len(slots), SCALE, dtype=np.float32),
            [PAGES],
            3,
            3,
            self.device,
        )
        y = self.y[rows]
        TRITON.add_lora(y, self.x[rows], self.pool, mix, 0)
        return y[row]


@pytest.mark.parametrize("step", ["33_rows_three_adapters", "rank_24_and_40"])
def test_the_same_step_gives_the_same_bits(
    step: str, triton_device: str, triton_dtype: torch.dtype, make_case: Any
) -> None:
    results = []
    for _ in range(REPEATS):
        case = make_case(step, triton_dtype, triton_device)
        TRITON.add_lora(case.y, case.x, case.pool, case.routed(), 0)
        results.append(case.y)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("num_rows", "num_adapters"),
    [(8, 3), (200, 3), (600, 3), (2048, 3), (8, 1), (2048, 1)],
    ids=["decode", "chunk", "prefill", "long_prefill", "decode_of_one", "prefill_of_one"],
)
def test_a_thousand_runs_give_the_same_bits(num_rows: int, num_adapters: int) -> None:
    """Decodes, chunks and prompts of three adapters and of none, and of one that has all rows."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    slots = np.arange(num_rows, dtype=np.int32) % (num_adapters + 1) - 1
    if num_adapters == 1:
        slots[:] = 1
    scales = np.linspace(0.5, 2.0, num_rows, dtype=np.float32)
    k, widths = 4096, (4096, 1024, 1024)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    pool = SitePool(randn(6, 3, 16, k) / 64, randn(6, 16, sum(widths)), widths)
    x, base = randn(num_rows, k), randn(num_rows, sum(widths))
    mix = RoutedMix.build(slots, scales, [PAGES], 3, 3, torch.device("cuda"))
    first = base.clone()
    TRITON.add_lora(first, x, pool, mix, 0)
    assert not torch.equal(first, base)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        y = base.clone()
        TRITON.add_lora(y, x, pool, mix, 0)
        differing += (y != first).any()
    assert differing.item() == 0


def test_a_rows_bits_depend_on_the_row_and_the_number_of_rows_alone(
    triton_device: str, triton_dtype: torch.dtype
) -> None:
    site = Site(triton_dtype, triton_device)
    one = site.run([1, 0, -1, 1, 2], 3, [0, 1, 2, 7, 4])
    other = site.run([1, 1, 2, 2, 0], 0, [7, 9, 8, 20, 21])
    assert torch.equal(one, other)
