"""An engine whose kernels compute wrongly does not start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine.start_up import kernel_check
from manylora.errors import UnsupportedError
from manylora_kernels import add_lora


def scaled_too_much(y: torch.Tensor, *others: Any) -> None:
    add_lora(y, *others)
    y *= 1.05


def every_row(y: torch.Tensor, *others: Any) -> None:
    y.nan_to_num_()
    add_lora(y, *others)


def not_a_number(y: torch.Tensor, *others: Any) -> None:
    add_lora(y, *others)
    y[0, -1] = torch.nan


@pytest.mark.parametrize("wrong", [scaled_too_much, every_row, not_a_number])
def test_wrong_numbers_stop_the_start(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., None]
) -> None:
    monkeypatch.setattr(kernel_check, "add_lora", wrong)
    with pytest.raises(UnsupportedError, match=r"compute the adapters' term of .*q_proj.* wrongly"):
        Engine(EngineConfig(base_model=str(tiny_model("llama")), num_threads=1))


@pytest.mark.parametrize("form", ["linear_lora", "gate_up_lora"])
@pytest.mark.parametrize("where", ["", " as in graphs"])
def test_wrong_numbers_of_any_form_that_steps_take_stop_the_start(
    form: str, where: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs take other kernels than steps that are launched one by one."""
    right, recorded = getattr(kernel_check, form), [False]

    @contextmanager
    def as_recorded() -> Iterator[None]:
        recorded[0] = True
        yield
        recorded[0] = False

    def wrong(*args: Any) -> torch.Tensor:
        y: torch.Tensor = right(*args)
        return y * 1.05 if recorded[0] == bool(where) else y

    monkeypatch.setattr(kernel_check, "as_recorded", as_recorded)
    monkeypatch.setattr(kernel_check, form, wrong)
    with pytest.raises(UnsupportedError, match=rf"wrongly on cpu .* of the term by {form}{where}, allowed"):
        Engine(EngineConfig(base_model=str(tiny_model("llama")), device="cpu", num_threads=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pool_is_empty_again_after_the_comparison(tiny_model: Callable[..., Path], dtype: str) -> None:
    config = EngineConfig(base_model=str(tiny_model("gpt2")), num_threads=1, dtype=dtype)
    with Engine(config) as engine:
        assert all(not part.any() for kind in engine.pool.tensors.kinds for part in kind.values())
