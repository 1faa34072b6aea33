"""The operations of base product and term together, as a CPU serves them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from manylora_kernels import (
    Mix,
    SitePool,
    add_lora,
    add_lora_silu_mul,
    gate_up_lora,
    linear_lora,
    reference,
    silu_mul,
)

K, WIDTH = 8, 12


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


WEIGHT = numbers(2 * WIDTH, K)


def product(x: torch.Tensor) -> torch.Tensor:
    return x @ WEIGHT.t()


def pool(widths: tuple[int, ...] = (WIDTH, WIDTH)) -> SitePool:
    return SitePool(numbers(3, len(widths), 16, K), numbers(3, 16, sum(widths)), widths)


def mix(slots: list[int], pages: tuple[int, ...] = (2, 0)) -> Mix:
    scales = np.full(len(slots), 0.5, dtype=np.float32)
    return Mix.build(np.array(slots, dtype=np.int32), scales, [[pages]], 1, 2, "cpu")


@pytest.mark.parametrize(
    "step",
    [mix([0, -1, 0]), mix([-1, -1, -1]), mix([0, 0, 0], pages=())],
    ids=["mixed", "no_adapters", "no_pages_here"],
)
def test_the_same_bits_as_one_after_the_other(step: Mix) -> None:
    x = numbers(3, K)
    y = product(x)
    add_lora(y, x, pool(), step, 0)
    assert torch.equal(linear_lora(x, product, pool(), step, 0), y)
    out = torch.full((3, WIDTH), torch.nan)
    add_lora_silu_mul(out, product(x), x, pool(), step, 0)
    assert torch.equal(gate_up_lora(x, product, pool(), step, 0), out)
    torch.testing.assert_close(out, reference.silu_mul(y))


def test_the_activation_alone_agrees_with_the_reference() -> None:
    y = numbers(5, 2 * WIDTH)
    torch.testing.assert_close(silu_mul(y), reference.silu_mul(y))


@pytest.mark.parametrize(
    "y", [torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(4, 2).t()], ids=["dims", "odd", "strides"]
)
def test_the_activation_refuses(y: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"allowed \[T, N\] with N even and stride 1"):
        silu_mul(y)


def test_gate_up_refuses_a_site_of_other_widths() -> None:
    with pytest.raises(ValueError, match=r"widths: found \[16, 8\], allowed two that are equal"):
        gate_up_lora(numbers(1, K), product, pool((16, 8)), mix([0]), 0)


@pytest.mark.parametrize("form", [linear_lora, gate_up_lora])
def test_refuses_what_add_lora_refuses(form: object) -> None:
    with pytest.raises(ValueError, match=r"x: found \[2, 8\], allowed \[1, 8\]"):
        form(numbers(2, K), lambda x: product(x)[:1], pool(), mix([0]), 0)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"kind: asked for 3, the mix has 0 .. 0"):
        form(numbers(1, K), product, pool(), mix([0]), 3)  # type: ignore[operator]
