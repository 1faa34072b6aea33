"""A compiled model says what its own code says, is compiled twice and never while it serves."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine.runner import Runner
from manylora.errors import InternalError, InvalidArgumentError
from manylora.model import loading
from manylora.model.attention import CacheProbe
from manylora.model.compiling import CompiledForward, compile_forward
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

FAMILIES = ["llama", "gemma2"]
RARER = ["qwen3", "gemma3", "phi3", "mistral", "gpt_oss", "qwen3_moe", "cohere", "gpt2"]
LENGTHS = (1, 21, 9, 14)
NUM_TOKENS = 10
MISMATCH = 1e-3
ADAPTERS = 2
ALL_LINEAR = {"target_modules": "all-linear"}
TARGETS: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "qwen3_moe": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module", autouse=True)
def fake_tensors_of_this_thread() -> None:
    """A torch with CUDA that finds no device crashes when the thread that traced first is gone (2.11): here
    that would be the first engine's."""
    with FakeTensorMode():
        torch.empty(1)


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], CompileCounterWithBackend]:
    """Have engines be compiled with another backend than inductor, which takes its time, and count."""

    def choose(backend: str) -> CompileCounterWithBackend:
        counter = CompileCounterWithBackend(backend)
        monkeypatch.setattr(
            loading, "compile_forward", lambda *arguments: compile_forward(*arguments, counter)
        )
        return counter

    return choose


@pytest.fixture(scope="module")
def make_config(
    tiny_model: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., EngineConfig]:
    """A family's model with two adapters of all its linears; small steps, so that chunks and decodes mix."""
    roots: dict[str, Path] = {}

    def make(family: str, compile_model: str) -> EngineConfig:
        base = tiny_model(family)
        if family not in roots:
            roots[family] = tmp_path_factory.mktemp(family)
            for seed in range(ADAPTERS):
                make_adapter(base, roots[family] / f"a{seed}", seed, r=8, **TARGETS.get(family, ALL_LINEAR))
        return EngineConfig(
            base_model=str(base),
            adapter_root=str(roots[family]),
            compile_model=compile_model,
            num_threads=1,
            max_batched_tokens=16,
            max_num_seqs=5,
            kv_block_size=4,
        )

    return make


def answers(config: EngineConfig) -> list[list[int]]:
    """Greedy ids of a batch in which some rows have an adapter, then of a single sequence."""
    with Engine(config) as engine:
        found = engine.generate(prompts(), adapter_ids=["", "a0", "a1", "a0"], max_tokens=NUM_TOKENS)
        found += engine.generate([prompts()[1]], adapter_ids=["a1"], max_tokens=NUM_TOKENS)
        assert engine.status().check_errors == []
    return [completion.token_ids for completion in found]


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in RARER)]
)
def test_a_family_says_the_same_and_is_compiled_twice(
    family: str,
    make_config: Callable[..., EngineConfig],
    compile_with: Callable[[str], CompileCounterWithBackend],
) -> None:
    counter = compile_with("aot_eager")
    assert answers(make_config(family, "true")) == answers(make_config(family, "false"))
    # One token, and any number from two on: each whole, and none of them while steps were run.
    assert counter.frame_count == 2


@pytest.mark.slow
# What inductor imports uses what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductors_code_says_the_same(
    make_config: Callable[..., EngineConfig], caplog: pytest.LogCaptureFixture
) -> None:
    found = answers(make_config("llama", "true"))
    assert [record for record in caplog.records if "runs as it is" in record.message] == []
    assert found == answers(make_config("llama", "false"))


def loaded_of(tiny_model: Callable[..., Path], **options: Any) -> loading.LoadedModel:
    return loading.load_model(EngineConfig(base_model=str(tiny_model("llama")), num_threads=1, **options))


def call(loaded: loading.LoadedModel, num_tokens: int, rows: list[int]) -> torch.Tensor:
    ids = (7 + torch.arange(num_tokens))[None]
    with loaded.context.during(CacheProbe()):
        output = loaded.module(
            input_ids=ids, position_ids=ids - 7, use_cache=False, logits_to_keep=torch.tensor(rows)
        )
    logits: torch.Tensor = output.logits
    return logits


STEPS = [(1, [0]), (2, [0, 1]), (2, [1]), (5, [4]), (5, [0, 1, 2, 3, 4]), (61, [60]), (130, [3, 100])]


@pytest.mark.parametrize("inside", [True, False], ids=["of_inference_mode", "of_no_mode"])
def test_steps_of_any_size_run_what_was_compiled(tiny_model: Callable[..., Path], inside: bool) -> None:
    """No step compiles, and none falls back to the model's own code either."""
    own, loaded = loaded_of(tiny_model), loaded_of(tiny_model)
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _examples: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    assert compile_forward(loaded.module, loaded.context, MISMATCH, backend)
    compiled = len(runs)
    for num_tokens, rows in STEPS:
        with torch.inference_mode(inside), torch.no_grad():
            found, wanted = call(loaded, num_tokens, rows), call(own, num_tokens, rows)
            assert found.is_inference() == inside
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted)
    assert len(runs) - compiled == len(STEPS)


@pytest.mark.slow
def test_more_engines_than_the_compiler_keeps_code_for_are_all_compiled(
    tiny_model: Callable[..., Path], compile_with: Callable[[str], CompileCounterWithBackend]
) -> None:
    counter = compile_with("eager")
    kept = [loaded_of(tiny_model, compile_model="true") for _ in range(6)]
    assert counter.frame_count == 2 * len(kept)


def test_a_model_that_cannot_be_compiled_serves_as_it_is(
    tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_args: Any) -> Any:
        raise ValueError("no such instruction")

    own, loaded = loaded_of(tiny_model), loaded_of(tiny_model)
    with caplog.at_level(logging.WARNING, "manylora.model.compiling"):
        assert not compile_forward(loaded.module, loaded.context, MISMATCH, broken)
    assert "LlamaForCausalLM cannot be compiled" in caplog.text
    assert "no such instruction" in caplog.text
    with torch.inference_mode():
        assert torch.equal(call(loaded, 5, [4]), call(own, 5, [4]))


def test_a_compiler_that_is_wrong_is_not_used(
    tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(graph: torch.fx.GraphModule, _examples: list[torch.Tensor]) -> Callable[..., Any]:
        return lambda *args: tuple(1.01 * out for out in graph(*args))

    own, loaded = loaded_of(tiny_model), loaded_of(tiny_model)
    with caplog.at_level(logging.WARNING, "manylora.model.compiling"):
        assert not compile_forward(loaded.module, loaded.context, MISMATCH, wrong)
    assert "logits differ by 0.01 of the largest, allowed is 0.001" in caplog.text
    with torch.inference_mode():
        assert torch.equal(call(loaded, 5, [4]), call(own, 5, [4]))


def test_a_failed_step_leaves_the_model_as_it_was(
    make_config: Callable[..., EngineConfig],
    compile_with: Callable[[str], CompileCounterWithBackend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error inside an operator reaches the step; the next one runs the compiled code again."""
    compile_with("eager")
    config = make_config("llama", "true")
    wanted = answers(make_config("llama", "false"))
    with Engine(config) as engine:
        runner = engine.runner
        monkeypatch.setattr(runner.model.context.caches[2], "keys", None)
        with pytest.raises(InternalError):
            engine.generate([prompts()[0]], max_tokens=2)
        monkeypatch.undo()
        found = engine.generate(prompts(), adapter_ids=["", "a0", "a1", "a0"], max_tokens=NUM_TOKENS)
        assert isinstance(runner, Runner)
        assert isinstance(runner.model.module.forward, CompiledForward)
    assert [completion.token_ids for completion in found] == wanted[:4]


def test_auto_is_for_cuda() -> None:
    config = EngineConfig(base_model="somewhere")
    assert loading.compiles(config, torch.device("cuda"))
    assert not loading.compiles(config, torch.device("cpu"))
    read = EngineConfig.from_strings({"base_model": "somewhere", "compile_model": "true"})
    assert loading.compiles(read, torch.device("cpu"))
    assert json.loads(read.to_json())["compile_model"] == "true"
    with pytest.raises(InvalidArgumentError, match="compile_model='yes': expected auto, true or false"):
        EngineConfig(base_model="somewhere", compile_model="yes")
