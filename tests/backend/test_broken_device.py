"""A step that fails ends its own requests; a device that is of no more use ends the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine.runner import Runner
from manylora.errors import InternalError, UnavailableError

FAILURES = [
    # As Triton's launcher, a library of the vendor, and torch itself tell of it.
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
]


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(EngineConfig(base_model=str(tiny_model("llama")), num_threads=1)) as engine:
        yield engine


def fail_once(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The next step fails so."""
    launch = engine.runner.launch

    def failing(*_: Any) -> Any:
        monkeypatch.setattr(engine.runner, "launch", launch)
        raise error

    monkeypatch.setattr(engine.runner, "launch", failing)
    with pytest.raises(InternalError):
        engine.generate([[1, 5, 9]], max_tokens=2)


@pytest.mark.parametrize("error", FAILURES, ids=["triton", "library", "torch"])
def test_a_broken_device_ends_the_engine_whoever_tells_of_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(engine.runner, "device_answers", lambda: False, raising=False)
    fail_once(engine, monkeypatch, error)
    with pytest.raises(UnavailableError, match="the engine is closed"):
        engine.generate([[1, 5, 9]], max_tokens=2)


@pytest.mark.parametrize(
    "error",
    [*FAILURES[:2], torch.OutOfMemoryError("CUDA out of memory")],
    ids=["triton", "library", "memory"],
)
def test_a_step_that_fails_on_a_device_that_answers_ends_only_its_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_once(engine, monkeypatch, error)
    (completion,) = engine.generate([[1, 5, 9]], max_tokens=2, ignore_eos=True)
    assert len(completion.token_ids) == 2
    assert engine.status().check_errors == []


def test_a_device_is_asked_by_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(_device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    for kind, answers in (("cpu", True), ("cuda", False)):
        runner: Any = SimpleNamespace(model=SimpleNamespace(device=torch.device(kind)))
        assert Runner.device_answers(runner) is answers
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    assert Runner.device_answers(runner)
