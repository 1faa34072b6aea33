"""What an engine does before its first request, so that no request waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora import EngineConfig
from manylora.adapters.pool_tensors import PoolTensors
from manylora.engine.flight import Flight
from manylora.engine.runner import Runner
from manylora.engine.start_up.dry_run import dry_run, run_steps
from manylora.engine.start_up.make_runner import make_runner
from manylora.engine.start_up.packing_check import prove_packing
from manylora.engine.start_up.warm_up import served_attention, served_shapes
from manylora.model.loading import LoadedModel, load_model

HERE = Path(__file__).parent


def start(directory: Path, **settings: Any) -> tuple[EngineConfig, LoadedModel, Runner]:
    config = EngineConfig(base_model=str(directory), device="cpu", dtype="float32", **settings)
    model = load_model(config)
    pool = PoolTensors(model.spec, config.max_loras, config.max_lora_rank, model.dtype, model.device)
    return config, model, make_runner(model, config, pool)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        pytest.param("gemma2", marks=pytest.mark.slow),
        pytest.param("gpt_oss", marks=pytest.mark.slow),
        pytest.param("phi3", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.slow),
    ],
)
def test_steps_compile_nothing_after_the_start(tiny_model: Callable[..., Path], family: str) -> None:
    """Plain; windows and soft cap; windows and sinks; fused linears; linears of other layout."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(HERE / "count_step_compilations.py"), str(tiny_model(family))],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    for kernel in ("_write_cache_kernel", "_decode_kernel", "_prefill_kernel", "_shrink_kernel"):
        assert found["cold"][kernel]
    assert found["before"]
    assert found["steps"] > 100
    assert found["while_serving"] == {}


def test_what_is_served_follows_from_model_and_configuration(tiny_model: Callable[..., Path]) -> None:
    config, model, _ = start(
        tiny_model("gpt_oss"), max_batched_tokens=70, max_num_seqs=4, max_lora_rank=40, max_loras=3
    )
    shapes = served_shapes(model, config, torch.float16)
    assert shapes.row_counts == tuple(range(1, 71))
    assert (shapes.max_slots, shapes.max_pages, shapes.pool_dtype) == (3, 3, torch.float16)
    assert [(site.num_inputs, site.widths) for site in shapes.sites] == [
        (kind.in_features, kind.out_features) for kind in model.spec.kinds
    ]
    attention = served_attention(model, config)
    assert (attention.block_size, attention.max_context, attention.max_queries) == (16, 256, 70)
    # Its layers alternate between a window and none, all with sinks.
    assert {(layer.window, layer.has_softcap, layer.sinks) for layer in attention.layers} == {
        (8, False, torch.float32),
        (0, False, torch.float32),
    }


@pytest.mark.parametrize("max_num_seqs", [3, 12], ids=["few", "many"])
def test_dummy_steps_are_as_large_as_steps_may_be(tiny_model: Callable[..., Path], max_num_seqs: int) -> None:
    config, _, runner = start(tiny_model("gemma2"), max_batched_tokens=100, max_num_seqs=max_num_seqs)
    assert run_steps(runner, config) == [100, 50, *[max_num_seqs] * 5]
    # What they leave behind in the cache disturbs nobody.
    prove_packing(runner)


def test_a_cpu_runs_no_dummy_steps(tiny_model: Callable[..., Path]) -> None:
    config, _, runner = start(tiny_model("llama"))

    def refuse(*_step: object) -> Flight:
        raise AssertionError("a step ran")

    runner.launch = refuse  # type: ignore[method-assign]
    dry_run(runner, config)
