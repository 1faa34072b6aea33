"""What fits into memory: the KV cache's size, and refusals of what a machine does not have."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from manylora import Engine, EngineConfig, cli
from manylora.adapters.pool_tensors import PoolTensors
from manylora.engine.start_up import capacity
from manylora.engine.start_up.capacity import DeviceMemory
from manylora.engine.start_up.make_runner import make_runner
from manylora.engine.start_up.packing_check import prove_packing
from manylora.errors import InvalidArgumentError
from manylora.memory import host_memory
from manylora.model.loading import load_model

GIB = 1 << 30
CONFIG = EngineConfig(base_model="any", max_num_seqs=8)
LEN = 8192
TOKEN_BYTES = 128 << 10
BLOCK_BYTES = 16 * TOKEN_BYTES
MEMORY = DeviceMemory(total_bytes=80 * GIB, free_bytes=60 * GIB, own_bytes=20 * GIB, step_bytes=GIB)


def blocks(memory: DeviceMemory, *, graphs: bool = False, **changes: object) -> int:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]  # by name
    return capacity.num_kv_blocks_of_device(config, LEN, TOKEN_BYTES, memory, graphs=graphs)


def test_the_cache_of_a_device_is_what_its_share_leaves_after_weights_pool_and_step() -> None:
    assert blocks(MEMORY) == (72 - 20 - 1) * GIB // BLOCK_BYTES
    assert blocks(MEMORY, gpu_memory_utilization=0.5) == (40 - 20 - 1) * GIB // BLOCK_BYTES


def test_graphs_keep_a_step_and_memory_of_their_own() -> None:
    # Buckets of 1, 2, 4 and 8 rows, with adapters and without.
    taken = GIB + 8 * capacity.GRAPH_BYTES
    assert blocks(MEMORY, graphs=True) == ((72 - 20 - 1) * GIB - taken) // BLOCK_BYTES


def test_what_other_processes_hold_is_not_taken() -> None:
    crowded = dataclasses.replace(MEMORY, free_bytes=10 * GIB)
    assert blocks(crowded) == (10 - 1) * GIB // BLOCK_BYTES


def test_a_small_models_cache_has_a_bounded_number_of_blocks() -> None:
    num = capacity.num_kv_blocks_of_device(CONFIG, LEN, 16, MEMORY, graphs=False)
    assert num == capacity.MAX_DEFAULT_BLOCKS


@pytest.mark.parametrize(
    "changes",
    [{"own_bytes": 71 * GIB, "free_bytes": 9 * GIB}, {"free_bytes": GIB}, {"own_bytes": 79 * GIB}],
    ids=["share", "others", "over"],
)
def test_a_device_that_holds_no_sequence_is_refused_with_numbers(changes: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"of 80.00 GiB leaves 0.00 GiB .* needs 1.00 GiB"):
        blocks(dataclasses.replace(MEMORY, **changes))


def test_a_default_cache_of_a_cpu_is_cut_to_the_memory_and_never_below_one_sequence() -> None:
    sizes = [capacity.num_kv_blocks(CONFIG, 1024, TOKEN_BYTES, room) for room in (None, GIB // 2, 0, -GIB)]
    assert sizes == [8 * 64, 256, 64, 64]
    # What is asked for by name is not cut.
    asked = dataclasses.replace(CONFIG, kv_cache_bytes=GIB)
    assert capacity.num_kv_blocks(asked, 1024, TOKEN_BYTES, GIB // 2) == GIB // BLOCK_BYTES


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        pytest.param({"max_loras": "1000000000"}, "max_loras=1000000000, max_lora_rank=64", id="max_loras"),
        pytest.param({"max_lora_rank": "1000000000"}, "max_loras=8, max_lora_rank=1000000000", id="rank"),
        pytest.param({"kv_cache_bytes": "900T"}, r"kv_cache_bytes\) 921600.00 GiB", id="kv_cache_bytes"),
    ],
)
def test_an_engine_refuses_what_the_machine_does_not_have_with_both_numbers(
    tiny_model: Callable[..., Path], settings: dict[str, str], told: str
) -> None:
    config = EngineConfig.from_strings({"base_model": str(tiny_model("llama")), "device": "cpu", **settings})
    found = re.escape(capacity.gib(host_memory()))
    with pytest.raises(InvalidArgumentError, match=rf"{told}.* = .* GiB, but this machine has {found}"):
        Engine(config)


def test_a_cache_that_only_its_default_makes_too_large_is_served(tiny_model: Callable[..., Path]) -> None:
    most = 1 << 40
    limits = {"max_num_seqs": most, "max_batched_tokens": most}
    with Engine(EngineConfig(base_model=str(tiny_model("llama")), device="cpu", **limits)) as engine:
        num_bytes = engine.runner.num_blocks * 16 * engine.model.cache_bytes_per_token()
        assert num_bytes <= host_memory()
        assert engine.generate([[5, 6]], max_tokens=2)[0].token_ids


def test_caches_made_anew_serve_as_the_first_ones(tiny_model: Callable[..., Path]) -> None:
    """As at start on CUDA, where the first ones are only there for the largest steps."""
    config = EngineConfig(base_model=str(tiny_model("llama")), device="cpu", max_loras=1)
    model = load_model(config)
    pool = PoolTensors(model.spec, 1, 16, model.dtype, model.device)
    first = capacity.num_dry_run_blocks(config, model.max_model_len)
    runner = make_runner(model, config, pool, first)
    rows = {cache.keys.shape[0] for cache in runner.model.context.caches.values()}
    runner.make_caches(0)
    runner.make_caches(40)
    prove_packing(runner)
    assert rows == {first * 16}
    assert {cache.keys.shape[0] for cache in runner.model.context.caches.values()} == {40 * 16}
    assert runner.num_blocks == 40


def test_a_plan_predicts_the_cache_of_a_device(
    tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", f"--base-model={tiny_model('llama')}", "--json", "--set=device=cuda"]
    found = []
    for more in (
        ["--device-memory=2G"],
        ["--device-memory=2G", "--set=gpu_memory_utilization=0.5"],
        ["--device-memory=2G", "--set=enforce_eager=true"],
        ["--device-memory=2G", "--set=kv_cache_bytes=64M"],
    ):
        capsys.readouterr()
        assert cli.main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    default, half, eager, asked = (plan["kv_bytes"] for plan in found)
    block_bytes = 16 * found[0]["kv_bytes_per_token"]
    assert default - half == pytest.approx(0.4 * 2 * GIB, abs=2 * block_bytes)
    assert half < default < eager
    assert asked == (64 << 20) // block_bytes * block_bytes
    assert all(plan["device_bytes"] + plan["step_bytes"] <= 0.9 * 2 * GIB for plan in found)
    assert cli.main([*words, "--device-memory=1M"]) == 2
    assert "gpu_memory_utilization=0.9 of 0.00 GiB leaves" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "1.01", "nan", "much", "-0.5"])
def test_a_share_of_memory_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(InvalidArgumentError, match="gpu_memory_utilization"):
        EngineConfig.from_strings({"base_model": "any", "gpu_memory_utilization": value})
