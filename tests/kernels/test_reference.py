"""The reference against loops in float64 that are written from the formula alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from manylora_kernels import reference


def loops(case: Any) -> torch.Tensor:
    """`y[t, s, n] += scale[t] * sum over r of (sum over k of x[t, k] A_s[r, k]) B_s[n, r]`, then scaled and
    offset where the adapter has vectors."""
    y: torch.Tensor = case.y.double()
    a, b, x = case.pool.a.double(), case.pool.b.double(), case.x.double()
    for t, slot in enumerate(case.slots.tolist()):
        if slot < 0:
            continue
        begin = 0
        for s, width in enumerate(case.pool.widths):
            for page in case.pages[slot]:
                for r in range(16):
                    h = sum(x[t, k] * a[page, s, r, k] for k in range(x.shape[1]))
                    y[t, begin : begin + width] += (
                        float(case.scales[t]) * h * b[page, r, begin : begin + width]
                    )
            begin += width
        for page in case.vectors[slot]:
            for n in range(y.shape[1]):
                scale, offset = (float(vector[page, n]) for vector in (case.pool.scale, case.pool.offset))
                y[t, n] = y[t, n] * scale + offset
    return y


@pytest.mark.parametrize(
    "name",
    [
        "one_row",
        "rank_24_and_40",
        "some_rows_without_adapter",
        "widths_not_a_multiple_of_16",
        "vectors_of_some",
        "vectors_and_no_pages",
    ],
)
def test_agrees_with_loops_over_the_formula(name: str, make_case: Any) -> None:
    case = make_case(name, torch.float32, "cpu")
    torch.testing.assert_close(case.expected().double(), loops(case), rtol=2e-5, atol=2e-5, equal_nan=True)


def test_shrink_puts_page_p_at_rank_rows_16_p() -> None:
    a = torch.randn(2, 3, 16, 8)
    x = torch.randn(5, 8)
    h = reference.shrink(x, a)
    assert h.shape == (5, 3, 32)
    torch.testing.assert_close(h[4, 2, 16 + 7], x[4] @ a[1, 2, 7])


def test_expand_gives_each_linear_its_own_columns() -> None:
    h = torch.zeros(1, 2, 16)
    h[0, 1, 3] = 2.0
    b = torch.randn(1, 16, 10)
    out = reference.expand(h, b, (6, 4))
    assert (out[0, :6] == 0).all()
    torch.testing.assert_close(out[0, 6:], 2 * b[0, 3, 6:])
