"""The engine with adapters: PEFT's tokens alone and mixed, through evictions, failures and cancels."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.engine import runner
from manylora.engine.flight import Flight
from manylora.engine.step import Step
from manylora.errors import InvalidArgumentError, NotFoundError, UnavailableError
from manylora.messages import Cancel, Generate, SamplingParams, Tokens
from transformers import AutoModelForCausalLM

from .inbox import Inbox

NUM_TOKENS = 12
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, object]] = {
    "r1": {"r": 1, "target_modules": ALL},
    "r8": {"r": 8, "target_modules": ALL, "lora_alpha": 32},
    "r16-q": {"r": 16, "target_modules": ["q_proj"]},
    "r20-rslora": {"r": 20, "target_modules": ALL, "use_rslora": True},
    "r40": {"r": 40, "target_modules": ["o_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 33, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"v_proj": 40},
    },
    "one-layer": {"r": 8, "target_modules": ALL, "layers_to_transform": [2]},
    "all-linear": {"r": 8, "target_modules": "all-linear"},
    "r64": {"r": 64, "target_modules": ALL},
}


@pytest.fixture(params=[False, True], ids=["step by step", "running ahead"], autouse=True)
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test holds either way; running ahead is how a GPU is served."""
    ahead = bool(request.param)
    monkeypatch.setattr(runner, "_runs_ahead", lambda model: ahead)
    return ahead


@pytest.fixture(scope="module")
def adapter_root(
    base: Path, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One PEFT adapter of each kind, strong enough to change what is said."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, options) in enumerate(KINDS.items()):
        make_adapter(base, root / name, seed, **options)
    return root


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = (3, 21, 9, 14)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def wanted(base: Path, adapter_root: Path) -> dict[tuple[str, int], list[int]]:
    """PEFT's greedy ids by (adapter, prompt), one at a time."""
    results = {}
    for name in ("", *KINDS):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if name:
            model = peft.PeftModel.from_pretrained(model, adapter_root / name)
        for number, ids in enumerate(prompts()):
            inputs = torch.tensor([ids])
            with torch.inference_mode():
                out = model.eval().generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=NUM_TOKENS,
                    do_sample=False,
                )
            results[name, number] = out[0, len(ids) :].tolist()
    return results


def make_config(base: Path, adapter_root: Path, **changes: object) -> EngineConfig:
    return EngineConfig(base_model=str(base), adapter_root=str(adapter_root), num_threads=1, **changes)


def test_the_adapters_say_different_things(wanted: dict[tuple[str, int], list[int]]) -> None:
    assert len({tuple(wanted[name, 1]) for name in ("", *KINDS)}) == len(KINDS) + 1


@pytest.mark.parametrize("name", ["", *KINDS])
def test_one_adapter_alone_matches_peft(
    base: Path, adapter_root: Path, wanted: dict[tuple[str, int], list[int]], name: str
) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        found = engine.generate(prompts(), adapter_ids=[name] * 4, max_tokens=NUM_TOKENS)
    assert [c.token_ids for c in found] == [wanted[name, number] for number in range(4)]


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"max_loras": 8}, id="all at once"),
        pytest.param({"max_loras": 2, "max_cpu_loras": 3}, id="rotating through both caches"),
        pytest.param({"max_loras": 1, "max_cpu_loras": 1}, id="one place"),
        pytest.param(
            {
                "max_loras": 1,
                "max_cpu_loras": 1,
                "max_model_len": 40,
                "kv_block_size": 4,
                "kv_cache_bytes": 36864,
            },
            id="one place and preemptions",
        ),
        pytest.param({"max_batched_tokens": 8, "max_num_seqs": 8, "kv_block_size": 4}, id="small chunks"),
    ],
)
def test_any_mix_matches_peft(
    base: Path, adapter_root: Path, wanted: dict[tuple[str, int], list[int]], limits: dict[str, int]
) -> None:
    work = [(name, number) for number in range(4) for name in ("", *KINDS)]
    with Engine(make_config(base, adapter_root, **limits)) as engine:
        found = engine.generate(
            [prompts()[number] for _, number in work],
            adapter_ids=[name for name, _ in work],
            max_tokens=NUM_TOKENS,
        )
        status = engine.status()
    assert {key: c.token_ids for key, c in zip(work, found, strict=True)} == wanted
    assert status.check_errors == []
    assert (status.gauges["running"], status.gauges["waiting"]) == (0, 0)
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]
    if "kv_cache_bytes" in limits:
        assert status.counters["preemptions"] > 0
    if "max_cpu_loras" in limits:
        assert status.counters["host_evictions"] > 0
        assert status.counters["device_evictions"] > 0


def test_prefixes_are_shared_within_an_adapter_only(
    base: Path, adapter_root: Path, wanted: dict[tuple[str, int], list[int]]
) -> None:
    with Engine(make_config(base, adapter_root, kv_block_size=4)) as engine:
        for name in ("", "r8", "r64", "r8", ""):
            (found,) = engine.generate([prompts()[1]], adapter_ids=[name], max_tokens=NUM_TOKENS)
            assert found.token_ids == wanted[name, 1]
        assert engine.status().counters["prefix_hit_tokens"] == 2 * 20


def test_a_bad_adapter_fails_its_requests_alone(base: Path, adapter_root: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_root / "r8", tmp_path / "r8")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    with Engine(make_config(base, tmp_path)) as engine:
        inbox = Inbox(engine)
        params = SamplingParams(max_tokens=5)
        for i, name in enumerate(["r8", "broken", "nowhere", "../r8", "broken", ""]):
            inbox.session.send(Generate(id=i, input_ids=prompts()[0], adapter_id=name, params=params))
        last = inbox.until_end(0, 1, 2, 3, 4, 5)
        codes = [getattr(last[i], "code", "ok") for i in range(6)]
        assert codes == ["ok", "INVALID_ARG", "NOT_FOUND", "INVALID_ARG", "INVALID_ARG", "ok"]
        with pytest.raises(NotFoundError):
            engine.generate([[5, 6]], adapter_ids=["nowhere"])
        assert engine.status().check_errors == []


@pytest.mark.parametrize(
    ("harm", "reason"),
    [("missing", "no adapter_root"), ("a file", "no adapter_root"), ("stale", "Stale file handle")],
)
def test_a_root_that_gives_an_error_stops_a_first_start_and_no_further_one(
    base: Path,
    adapter_root: Path,
    wanted: dict[tuple[str, int], list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: str,
    reason: str,
) -> None:
    root = tmp_path / "root"
    config = make_config(base, root, pinned_adapters=("r8",))
    if harm == "a file":
        root.touch()
    real = Path.is_dir

    def is_dir(path: Path) -> bool:
        """What a file server's client says of a directory that was made anew there."""
        if path == root:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path)

    with monkeypatch.context() as patch:
        if harm == "stale":
            patch.setattr(Path, "is_dir", is_dir)
        with pytest.raises(InvalidArgumentError, match="adapter_root="):
            Engine(config)
        with Engine(config, strict_preload=False) as engine:
            (found,) = engine.generate([prompts()[1]], max_tokens=NUM_TOKENS)
            assert found.token_ids == wanted["", 1]
            for name in ("r8", "r64"):
                message = f"^adapter '{name}' cannot be looked for: {reason}$"
                with pytest.raises(UnavailableError, match=message):
                    engine.generate([[5, 6]], adapter_ids=[name])
            patch.undo()
            root.unlink(missing_ok=True)
            shutil.copytree(adapter_root, root)
            for name in ("r8", "r64"):
                (found,) = engine.generate([prompts()[1]], adapter_ids=[name], max_tokens=NUM_TOKENS)
                assert found.token_ids == wanted[name, 1]
            status = engine.status()
    assert [(a.name, a.pinned) for a in status.adapters] == [("r64", False), ("r8", True)]
    assert status.check_errors == []


def test_cancelling_frees_everything_at_once(base: Path, adapter_root: Path) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        inbox = Inbox(engine)
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        for i, name in enumerate(["", "r8", "r64", "r8"]):
            inbox.session.send(Generate(id=i, input_ids=prompts()[i], adapter_id=name, params=params))
        first = inbox.events.get(timeout=60)
        assert isinstance(first, Tokens)
        for i in range(4):
            inbox.session.send(Cancel(i))
        assert {e.code for e in inbox.until_end(0, 1, 2, 3).values()} == {"CANCELLED"}
        status = engine.status()
    assert (status.gauges["running"], status.gauges["waiting"]) == (0, 0)
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]
    assert status.check_errors == []


def test_a_closed_session_leaves_nothing_running(base: Path, adapter_root: Path) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        inbox = Inbox(engine)
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        inbox.session.send(Generate(id=0, input_ids=[5], adapter_id="r8", params=params))
        inbox.events.get(timeout=60)
        inbox.session.close()
        status = engine.status()
    assert (status.gauges["running"], status.counters["cancelled"]) == (0, 1)


def test_closing_the_engine_answers_what_is_in_flight(base: Path, adapter_root: Path) -> None:
    engine = Engine(make_config(base, adapter_root, max_num_seqs=2))
    inbox = Inbox(engine)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    for i in range(5):
        inbox.session.send(Generate(id=i, input_ids=prompts()[0], params=params))
    inbox.events.get(timeout=60)
    engine.close()
    inbox.session.send(Generate(id=5, input_ids=prompts()[0], params=params))
    assert {e.code for e in inbox.until_end(0, 1, 2, 3, 4, 5).values()} == {"UNAVAILABLE"}
    with pytest.raises(UnavailableError):
        engine.status()


def test_a_fault_in_a_step_ends_its_requests_and_no_others(
    base: Path, adapter_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        launch = engine.runner.launch
        broken = threading.Event()

        def fail_once(step: Step) -> Flight:
            if not broken.is_set():
                broken.set()
                raise RuntimeError("injected")
            return launch(step)

        monkeypatch.setattr(engine.runner, "launch", fail_once)
        inbox = Inbox(engine)
        inbox.session.send(Generate(id=0, input_ids=prompts()[0], adapter_id=""))
        assert inbox.until_end(0)[0].code == "INTERNAL"
        (after,) = engine.generate([prompts()[0]], max_tokens=4)
        assert len(after.token_ids) == 4
        assert engine.status().check_errors == []


def test_a_fault_of_the_loop_itself_leaves_nobody_waiting(
    base: Path, adapter_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(make_config(base, adapter_root))
    inbox = Inbox(engine)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    for i, name in enumerate(["", "r8"]):
        inbox.session.send(Generate(id=i, input_ids=prompts()[0], adapter_id=name, params=params))
    inbox.events.get(timeout=60)

    def broken() -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.registry, "poll", broken)
    inbox.session.send(Generate(id=2, input_ids=prompts()[0], params=params))
    assert {e.code for e in inbox.until_end(0, 1, 2).values()} <= {"INTERNAL", "UNAVAILABLE"}
    with pytest.raises(UnavailableError):
        engine.generate([prompts()[0]])
    with pytest.raises(UnavailableError):
        engine.status()
    engine.close()
    assert not engine.is_alive


def test_messages_that_no_front_end_sends_hurt_nobody(base: Path, adapter_root: Path) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        inbox = Inbox(engine)
        inbox.session.send(Generate(id=0, input_ids=[]))
        inbox.session.send(Generate(id=1, input_ids=[5] * 400))
        inbox.session.send(Generate(id=2, input_ids=[300]))
        inbox.session.send(Generate(id=3, input_ids=prompts()[0], params=SamplingParams(max_tokens=3)))
        last = inbox.until_end(0, 1, 2, 3)
        assert [getattr(last[i], "code", "ok") for i in range(4)] == [*["INVALID_ARG"] * 3, "ok"]


@pytest.mark.parametrize("stage", ["session", "engine"])
def test_closing_while_an_adapter_loads_hangs_nothing(base: Path, adapter_root: Path, stage: str) -> None:
    engine = Engine(make_config(base, adapter_root))
    inbox = Inbox(engine)
    inbox.session.send(Generate(id=0, input_ids=prompts()[0], adapter_id="r64"))
    if stage == "session":
        inbox.session.close()
        (after,) = engine.generate([prompts()[0]], adapter_ids=["r64"], max_tokens=2)
        assert len(after.token_ids) == 2
        assert engine.status().check_errors == []
    engine.close()
    if stage == "engine":
        assert inbox.until_end(0)


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(base: Path, adapter_root: Path) -> None:
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 7, "max_tokens": NUM_TOKENS}
    with Engine(make_config(base, adapter_root)) as engine:
        together = engine.generate(prompts(), adapter_ids=["", "r8", "r64", "r1"], **options)
        alone = [
            engine.generate([p], adapter_ids=[a], **options)[0]
            for p, a in zip(prompts(), ["", "r8", "r64", "r1"], strict=True)
        ]
        again = engine.generate(prompts()[:1] * 3, **options)
        free = engine.generate(prompts()[:1] * 3, temperature=1.0, max_tokens=NUM_TOKENS)
    assert together == alone
    assert len({tuple(c.token_ids) for c in again}) == 1
    assert len({tuple(c.token_ids) for c in free}) == 3


def test_a_stop_string_ends_the_text_before_it(base: Path, adapter_root: Path) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        (whole,) = engine.generate(["hello"], max_tokens=40, ignore_eos=True)
        stop = whole.text[7:10]
        (cut,) = engine.generate(["hello"], max_tokens=40, ignore_eos=True, stop=[stop])
        assert engine.status().gauges["running"] == 0
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < 40


def test_what_a_caller_gets_wrong_is_told(base: Path, adapter_root: Path) -> None:
    with Engine(make_config(base, adapter_root)) as engine:
        with pytest.raises(InvalidArgumentError, match="unknown option max_token; known are max_tokens"):
            engine.generate(["x"], max_token=3)
        with pytest.raises(InvalidArgumentError, match="the prompt has no tokens"):
            engine.generate([""])
        with pytest.raises(
            InvalidArgumentError, match="the prompt has 256 tokens; allowed are below max_model_len=256"
        ):
            engine.generate([[5] * 256])
        with pytest.raises(InvalidArgumentError, match="got 300, allowed are ids from 0 to 299"):
            engine.generate([[5, 300]])
        for option, value in [
            ("seed", -1),
            ("temperature", -1.0),
            ("temperature", float("nan")),
            ("top_k", -600),
            ("max_tokens", 0),
        ]:
            with pytest.raises(InvalidArgumentError, match=f"option {option}: got"):
                engine.generate(["x"], **{option: value})
        with pytest.raises(InvalidArgumentError, match="2 prompts, 1 adapter_ids: must be as many"):
            engine.generate(["a", "b"], adapter_ids=["r8"])
