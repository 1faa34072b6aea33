"""Base product and adapters' term together: the order of the launches, and the bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from manylora_kernels import Mix, SitePool, capture, streams
from manylora_kernels.lora import triton_form
from manylora_kernels.lora.one_adapter import OneAdapter
from manylora_kernels.lora.routed import RoutedMix
from manylora_kernels.lora.triton_form import MAX_ROWS_BESIDE, TRITON, runs_beside
from manylora_kernels.streams import run_beside, side_stream


class RecordedStreams:
    """Two streams where there is no device: notes what was asked, and on which stream work was given."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.current = "main"

    def fork(self) -> None:
        assert self.current == "main"
        self.notes.append("fork")

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.current = "side"
        try:
            yield
        finally:
            self.current = "main"

    def join(self) -> None:
        assert self.current == "main"
        self.notes.append("join")

    def noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.notes.append(f"{name} on {self.current}")
            return function(*args, **kwargs)

        return wrapped


def linear(case: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """x with numbers in every row, and a base product for it."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(case.x.shape, generator=generator).to(case.x.device, case.x.dtype)
    weight = torch.randn(case.y.shape[1], x.shape[1], generator=generator).to(x.device, x.dtype) / 8
    return x, lambda x: torch.nn.functional.linear(x, weight)


def test_a_linear_has_the_bits_of_product_and_term_one_after_the_other(
    step: str, triton_dtype: torch.dtype, triton_device: str, make_case: Any
) -> None:
    case = make_case(step, triton_dtype, triton_device)
    x, product = linear(case)
    mix = case.routed()
    expected = product(x)
    TRITON.add_lora(expected, x, case.pool, mix, 0)
    assert runs_beside(mix, x.device, RecordedStreams())
    assert torch.equal(TRITON.linear_lora(x, product, case.pool, mix, 0), expected)


@pytest.mark.parametrize("step", ["gate_and_up", "empty_segment", "vectors_of_gate_and_up"])
def test_gate_and_up_have_the_bits_of_product_and_term_one_after_the_other(
    step: str, triton_dtype: torch.dtype, triton_device: str, make_case: Any
) -> None:
    case = make_case(step, triton_dtype, triton_device)
    x, product = linear(case)
    mix = case.routed()
    expected = torch.full((len(x), case.pool.widths[0]), torch.nan, dtype=x.dtype, device=x.device)
    TRITON.add_lora_silu_mul(expected, product(x), x, case.pool, mix, 0)
    found = TRITON.gate_up_lora(x, product, case.pool, mix, 0)
    assert not found.isnan().any()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("form", "expand"), [(TRITON.linear_lora, "expand"), (TRITON.gate_up_lora, "expand_silu_mul")]
)
def test_shrink_is_launched_beside_the_product_and_expand_behind_both(
    form: Callable[..., torch.Tensor],
    expand: str,
    triton_device: str,
    make_case: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case("gate_and_up", torch.float32, triton_device)
    x, product = linear(case)
    side = RecordedStreams()
    for name in ("empty_h", "shrink", expand):
        monkeypatch.setattr(triton_form, name, side.noted(name, getattr(triton_form, name)))
    form(x, side.noted("product", product), case.pool, case.routed(), 0, side)
    assert side.notes == [
        "empty_h on main", "fork", "shrink on side", "product on main", "join", f"{expand} on main",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["side", "main"])
def test_streams_are_joined_when_one_of_them_fails(broken: str) -> None:
    side = RecordedStreams()

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            if name == broken:
                raise RuntimeError(name)

        return run

    with pytest.raises(RuntimeError, match=broken):
        run_beside(side, work("side"), work("main"))
    assert side.notes == ["fork", "join"]
    assert side.current == "main"


def routed_rows(num_rows: int, device: str) -> RoutedMix:
    slots, scales = np.zeros(num_rows, dtype=np.int32), np.ones(num_rows, dtype=np.float32)
    return RoutedMix.build(slots, scales, [[(0,)]], 1, 1, torch.device(device))


def test_long_steps_and_the_vendors_products_take_turns(triton_device: str) -> None:
    limit = MAX_ROWS_BESIDE
    device, side = torch.device(triton_device), RecordedStreams()
    assert runs_beside(routed_rows(limit, triton_device), device, side)
    assert not runs_beside(routed_rows(limit + 1, triton_device), device, side)
    few = routed_rows(8, triton_device)
    one = OneAdapter.of(
        np.zeros(8, np.int32), np.ones(8, np.float32), [[(0,)]], 8, torch.device(triton_device)
    )
    assert not runs_beside(replace(few, one_adapter=one), device, side)


def test_a_step_that_warms_a_recording_up_takes_the_form_that_is_recorded(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    mix, cuda = routed_rows(8, triton_device), torch.device("cuda")
    assert not runs_beside(mix, cuda)
    with streams.as_recorded():
        assert runs_beside(mix, cuda)
        assert not runs_beside(routed_rows(MAX_ROWS_BESIDE + 1, triton_device), cuda)
    assert not runs_beside(mix, cuda)


def test_a_long_step_gives_the_same_as_the_parts(triton_device: str) -> None:
    num_rows = MAX_ROWS_BESIDE + 1
    generator = torch.Generator().manual_seed(1)
    x, a, b, weight = (
        torch.randn(*shape, generator=generator).to(triton_device)
        for shape in ((num_rows, 16), (1, 2, 16, 16), (1, 16, 32), (32, 16))
    )
    pool, mix = SitePool(a, b, (16, 16)), routed_rows(num_rows, triton_device)
    side = RecordedStreams()
    y = x @ weight.t()
    out = y.new_empty(num_rows, 16)
    TRITON.add_lora_silu_mul(out, y, x, pool, mix, 0)
    assert torch.equal(TRITON.gate_up_lora(x, lambda x: x @ weight.t(), pool, mix, 0, side), out)
    TRITON.add_lora(y, x, pool, mix, 0)
    assert torch.equal(TRITON.linear_lora(x, lambda x: x @ weight.t(), pool, mix, 0, side), y)
    assert side.notes == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_two_streams_give_the_bits_of_one(captured: bool) -> None:
    """Many sites in a row, so that memory is used again while both streams run."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    k, num_rows = 4096, 32
    slots, scales = np.arange(num_rows, dtype=np.int32) % 5 - 1, np.ones(num_rows, dtype=np.float32)
    pages = [(0,), (1, 2), (3,), (4,)]
    mix = Mix.build(slots, scales, [pages], 4, 2, "cuda")
    assert mix.routed is not None
    square = SitePool(randn(5, 1, 16, k) / 64, randn(5, 16, k) / 64, (k,))
    gate_up = SitePool(randn(5, 2, 16, k) / 64, randn(5, 16, 2 * k) / 64, (k, k))
    weight, wide = randn(k, k) / 64, randn(2 * k, k) / 64

    def serial(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            y = torch.nn.functional.linear(x, weight)
            TRITON.add_lora(y, x, square, mix.routed, 0)
            gates = torch.nn.functional.linear(y, wide)
            x = torch.empty_like(y)
            TRITON.add_lora_silu_mul(x, gates, y, gate_up, mix.routed, 0)
        return x

    def beside(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            y = TRITON.linear_lora(
                x, lambda x: torch.nn.functional.linear(x, weight), square, mix.routed, 0, side
            )
            x = TRITON.gate_up_lora(
                y, lambda x: torch.nn.functional.linear(x, wide), gate_up, mix.routed, 0, side
            )
        return x

    # Steps that are launched one by one use one stream, unless they name the other.
    side = None if captured else side_stream(torch.device("cuda", 0))
    x = randn(num_rows, k)
    expected, found = serial(x), torch.zeros_like(x)
    if captured:
        stream = torch.cuda.Stream()
        capture.warm_up(lambda: beside(x), stream)
        graph = capture.capture(lambda: found.copy_(beside(x)), stream)
        assert not found.any()
        graph.replay()
    else:
        found.copy_(beside(x))
    assert torch.equal(found, expected)
