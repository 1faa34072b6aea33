"""Decode steps through recorded graphs say what a plain engine says, whatever adapters they mix.

On a GPU these are CUDA graphs; elsewhere the same steps run in triton's interpreter on a graph's own tensors,
in a process of its own: padding, tables and mixes are proved there, the capture itself on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine import runner
from manylora.engine.graph_recorder import PlainRecorder, Replay
from manylora.engine.start_up import graph_start
from manylora.engine.step_graphs import StepGraphs, buckets
from manylora.engine.step_tensors import StepTensors, Uploader
from manylora.model import loading
from manylora.model.compiling import compile_forward
from manylora.model.paged_attention import PagedPlan
from manylora_kernels import Mix
from manylora_kernels.attention.paged_batch import PagedBatch
from manylora_kernels.lora.device_form import form_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="runs in a process with the interpreter"
)
RANKS = {"small": 4, "two_pages": 20, "three_pages": 40, "narrow": 16}
NUM_TOKENS = 5
LENGTHS = (3, 13, 7, 1, 9)


def prompts(seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapter_root(
    base: Path, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items()):
        targets = ["v_proj", "down_proj"] if name == "narrow" else ["q_proj", "o_proj", "up_proj"]
        make_adapter(base, root / name, seed, r=rank, target_modules=targets)
    return root


@pytest.fixture
def config(base: Path, adapter_root: Path) -> EngineConfig:
    """Blocks of 4 tokens and 16 tokens a step: decodes cross blocks and run beside chunks of prompts."""
    return EngineConfig(
        base_model=str(base),
        adapter_root=str(adapter_root),
        device=DEVICE,
        dtype="float32",
        num_threads=1,
        max_loras=2,
        max_lora_rank=48,
        max_cpu_loras=4,
        max_model_len=64,
        max_num_seqs=5,
        max_batched_tokens=16,
        kv_block_size=4,
    )


@pytest.fixture
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take the Triton kernels' forms on any device."""
    monkeypatch.setattr(runner, "serves_paged", lambda model: True)


def plain(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine of the CPU's own forms."""
    with monkeypatch.context() as patch:
        patch.setattr(runner, "serves_paged", lambda model: False)
        return Engine(replace(config, device="cpu"))


def says(engine: Engine, names: list[str], seed: int = 1) -> list[list[int]]:
    chosen = prompts(seed)[: len(names)]
    found = engine.generate(chosen, adapter_ids=names, max_tokens=NUM_TOKENS, ignore_eos=True)
    assert engine.status().check_errors == []
    return [completion.token_ids for completion in found]


def test_buckets_go_up_in_eighths_and_end_at_the_largest_step() -> None:
    assert buckets(1) == (1,)
    assert buckets(5) == (1, 2, 4, 5)
    assert buckets(8) == (1, 2, 4, 8)
    assert buckets(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert buckets(200)[11:] == (80, 96, 112, 128, 160, 192, 200)
    for rows in range(33, 2000):
        chosen = next(bucket for bucket in buckets(4096) if bucket >= rows)
        assert (chosen - rows) / chosen < 1 / 5


@needs_triton
@pytest.mark.usefixtures("in_triton")
def test_replayed_decodes_say_what_a_plain_engine_says(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base only, one adapter, all kinds of adapters, more of them than the device has room for."""
    calls = [
        ["", "", ""],
        ["two_pages"],
        ["small", "", "three_pages", "small", ""],
        ["narrow", "small", "two_pages", "three_pages", ""],
        ["", ""],
    ]
    with plain(config, monkeypatch) as engine:
        wanted = [says(engine, names, seed) for seed, names in enumerate(calls)]
    assert len({tuple(ids) for texts in wanted for ids in texts}) == sum(map(len, calls))
    with Engine(config) as engine:
        graphs = engine.runner.graphs
        assert graphs is not None
        # The proof at the start leaves the pool as it was.
        for kind in engine.pool.tensors.kinds:
            assert not any(part.any() for part in kind.values())
        graphs.replays.clear()
        for seed, (names, texts) in enumerate(zip(calls, wanted, strict=True)):
            before = graphs.replays.total()
            assert says(engine, names, seed) == texts
            assert graphs.replays.total() > before
        counters = engine.status().counters
        assert counters["steps"] > graphs.replays.total(), "prompts are no decodes"
    # Steps of 3 rows were padded; those of the base model went to graphs of their own.
    assert {rows for rows, _ in graphs.replays} == {1, 2, 4, 5}
    assert {has_adapters for _, has_adapters in graphs.replays} == {True, False}


@needs_triton
@pytest.mark.usefixtures("in_triton")
def test_all_that_a_gpu_is_served_with_at_once(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled model code, inside graphs, in steps that are launched before the ones in front have landed."""
    calls = [["small", "", "three_pages", "small", ""], ["narrow"]]
    with plain(config, monkeypatch) as engine:
        wanted = [says(engine, names, seed) for seed, names in enumerate(calls)]
    monkeypatch.setattr(runner, "_runs_ahead", lambda model: True)
    runs: list[str] = []
    compilations: list[str] = []

    def backend(module: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., object]:
        compilations.append("compiled")

        def run(*args: torch.Tensor) -> object:
            runs.append("run")
            return module(*args)

        return run

    monkeypatch.setattr(loading, "compile_forward", lambda *arguments: compile_forward(*arguments, backend))
    with Engine(replace(config, compile_model="true")) as engine:
        graphs = engine.runner.graphs
        assert graphs is not None
        graphs.replays.clear()
        assert [says(engine, names, seed) for seed, names in enumerate(calls)] == wanted
        assert engine.status().counters["steps_ahead"] > 0
        # Every graph holds the compiled code, whatever its number of rows.
        runs.clear()
        with torch.inference_mode():
            for graph in graphs._graphs.values():
                graph.replay()
        assert len(runs) == len(graphs._graphs) == 2 * len(graphs.buckets)
    assert {rows for rows, _ in graphs.replays} >= {1, 4, 5}
    assert len(compilations) == 2


@pytest.mark.slow
@needs_triton
@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_other_architectures_replay(
    family: str, tiny_model: Callable[..., Path], config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and soft caps; experts."""
    directory = tiny_model(family, num_hidden_layers=2)
    config = replace(config, base_model=str(directory), adapter_root="", max_num_seqs=3)
    with plain(config, monkeypatch) as engine:
        wanted = says(engine, ["", "", ""])
    with Engine(config) as engine:
        assert says(engine, ["", "", ""]) == wanted
        assert engine.runner.graphs is not None
        assert engine.runner.graphs.replays.total() > 3


@needs_triton
@pytest.mark.usefixtures("in_triton")
def test_enforce_eager_records_nothing(config: EngineConfig) -> None:
    assert EngineConfig.from_strings({"base_model": "any", "enforce_eager": "true"}).enforce_eager
    with Engine(replace(config, enforce_eager=True)) as engine:
        assert engine.runner.graphs is None
        assert len(says(engine, ["", "small"])[1]) == NUM_TOKENS


def test_a_cpu_without_triton_records_nothing(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with plain(config, monkeypatch) as engine:
        assert engine.runner.graphs is None


class RefusingRecorder(PlainRecorder):
    """As CUDA does where a model asks the device for a value."""

    was_abandoned = False

    def record(self, body: Replay) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    def abandon(self) -> None:
        self.was_abandoned = True


class StaleRecorder(PlainRecorder):
    """A replay that does not see what changed since."""

    def record(self, body: Replay) -> Replay:
        body()
        return lambda: None


@needs_triton
@pytest.mark.usefixtures("in_triton")
def test_a_model_that_cannot_be_recorded_is_served_eagerly(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = RefusingRecorder()
    monkeypatch.setattr(graph_start, "recorder_for", lambda device: recorder)
    names = ["small", "", "narrow"]
    with plain(config, monkeypatch) as engine:
        wanted = says(engine, names)
    with Engine(config) as engine:
        assert engine.runner.graphs is None
        assert says(engine, names) == wanted
    assert recorder.was_abandoned
    assert "decode steps of LlamaForCausalLM cannot be recorded as graphs" in caplog.text
    assert "operation not permitted when stream is capturing" in caplog.text


@pytest.mark.slow
@needs_triton
@pytest.mark.usefixtures("in_triton")
def test_a_model_that_replays_other_numbers_is_served_eagerly(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graph_start, "recorder_for", lambda device: StaleRecorder())
    with plain(config, monkeypatch) as engine:
        wanted = says(engine, ["small", ""])
    with Engine(config) as engine:
        assert engine.runner.graphs is None
        assert says(engine, ["small", ""]) == wanted
    assert "logits of the base model, 4 rows, replayed, differ by" in caplog.text
    assert "logits of 2 adapters, 5 rows, replayed, differ by" in caplog.text


class Forgetful(StepGraphs):
    """The largest graph has lost the adapter of one of its rows."""

    def run(self, step: StepTensors) -> torch.Tensor:
        found = super().run(step)
        if step.mix is not None and step.input_ids.shape[1] == self.buckets[-1]:
            before = found.clone()
            base = super().run(replace(step, mix=None))
            before[3] = base[3]
            found.copy_(before)
        return found


@pytest.mark.slow
@needs_triton
@pytest.mark.usefixtures("in_triton")
def test_the_largest_graph_is_proved_for_each_row_of_several_adapters(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graph_start, "StepGraphs", Forgetful)
    # However much logits may be apart on the whole, as those of 16-bit models may.
    monkeypatch.setattr(graph_start, "allowed_difference", lambda dtype, scale: torch.inf)
    with Engine(config) as engine:
        assert engine.runner.graphs is None
    assert "what 2 adapters, 5 rows change of logits, replayed, differs by 1 of it" in caplog.text


def toy(steps: list[StepTensors]) -> StepGraphs:
    """Graphs of a model whose logits are its inputs; `steps` collects what it is called with."""
    uploader = Uploader(
        device=torch.device(DEVICE),
        block_size=4,
        max_loras=2,
        max_pages=1,
        num_kinds=1,
        paged=True,
        form=form_of(DEVICE, triton=True),
    )

    def forward(step: StepTensors) -> torch.Tensor:
        steps.append(step)
        assert step.sample_rows is None
        assert isinstance(step.plan, PagedPlan)
        batch = step.plan.batch
        rows = [step.input_ids[0], step.positions[0], batch.contexts, batch.write_rows]
        if step.mix is not None:
            rows.append(step.mix.step.packed[: step.mix.num_rows])
        return torch.nn.functional.pad(torch.stack(rows, 1).float(), (0, 5 - len(rows)))

    graphs = StepGraphs(forward, uploader, 8, 32, [3], [2], PlainRecorder())
    graphs.capture()
    return graphs


def toy_step(ids: list[int], num_rows: int, slots: list[int] | None) -> StepTensors:
    """Token i of sequence i at position i, in block i."""
    size = len(ids)
    paged = PagedBatch.build(
        [1] * size, [i + 1 for i in range(size)], [[i, i] for i in range(size)], 4, DEVICE, num_rows=num_rows
    )
    padded = torch.zeros(1, num_rows, dtype=torch.int64)
    padded[0, :size] = torch.tensor(ids)
    mix = None
    if slots is not None:
        row_slots = np.array(slots + [-1] * (num_rows - size), dtype=np.int32)
        pages = [[(2,), (0,)]]
        mix = Mix.build(
            row_slots, np.ones(num_rows, np.float32), pages, 2, 1, DEVICE, form=form_of(DEVICE, triton=True)
        )
    return StepTensors(
        input_ids=padded.to(DEVICE),
        positions=torch.arange(num_rows, device=DEVICE)[None],
        sample_rows=None,
        plan=PagedPlan(paged),
        mix=mix,
    )


@needs_triton
def test_a_replay_reads_the_step_and_rows_that_pad_are_empty() -> None:
    graphs = toy([])
    assert [graphs.bucket_of(rows) for rows in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, None]
    found = graphs.run(toy_step([7, 8, 9], 4, [1, -1, 0]))
    assert found.tolist() == [[7, 0, 1, 0, 1], [8, 1, 2, 5, -1], [9, 2, 3, 10, 0], [0, 3, 0, -1, -1]]
    found = graphs.run(toy_step([5], 4, None))
    assert found.tolist() == [[5, 0, 1, 0, 0], [0, 1, 0, -1, 0], [0, 2, 0, -1, 0], [0, 3, 0, -1, 0]]
    assert graphs.replays == {(4, True): 1, (4, False): 1}


@needs_triton
def test_a_step_of_the_base_model_has_no_mix_and_one_with_adapters_always_the_same() -> None:
    steps: list[StepTensors] = []
    graphs = toy(steps)
    steps.clear()
    graphs.run(toy_step([7], 1, None))
    # Built with adapters of which no row has one.
    graphs.run(toy_step([7], 1, [-1]))
    graphs.run(toy_step([7], 1, [1]))
    graphs.run(toy_step([7], 1, [0]))
    first, second, third, fourth = (step.mix for step in steps)
    assert first is second is None
    assert third is fourth
    assert third is not None
    assert third.page_limits == (3,)


@needs_triton
def test_a_step_for_which_nothing_was_recorded_is_refused() -> None:
    with pytest.raises(ValueError, match="found 3 rows, allowed decodes in"):
        toy([]).run(toy_step([7], 3, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_thousand_replays_give_the_same_bits(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with and without adapters take turns in one pool of memory."""
    steps: list[StepTensors] = []
    with Engine(config) as engine:
        graphs = engine.runner.graphs
        assert graphs is not None
        original = graphs.run

        def remember(step: StepTensors) -> torch.Tensor:
            steps.append(step)
            return original(step)

        with monkeypatch.context() as patch:
            patch.setattr(graphs, "run", remember)
            says(engine, ["small", "three_pages", "", "small", ""])
        mixed = next(step for step in steps if step.mix is not None)
        # Both write the same rows of the cache and read none that the other writes.
        turns = [mixed, replace(mixed, mix=None)]
        first = [graphs.run(step).clone() for step in turns]
        assert not torch.equal(*first)
        differing = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            for step, wanted in zip(turns, first, strict=True):
                differing += (graphs.run(step) != wanted).any()
        assert int(differing) == 0


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests run in this process")
@pytest.mark.parametrize(
    ("chosen", "num_tests"), [("not slow", 9), pytest.param("slow", 4, marks=pytest.mark.slow)]
)
def test_passes_in_the_interpreter(chosen: str, num_tests: int, pass_interpreted: Callable[..., str]) -> None:
    assert f"\n{num_tests} passed" in pass_interpreted(__file__, "-m", chosen)
