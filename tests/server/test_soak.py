"""A small soak; bench/soak.py runs it at length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from manylora.serve.background import running_server

from bench.campaigns.harness import Peft, status_of
from bench.campaigns.server_state import main_processes, server_faults
from bench.campaigns.soak.drive import Answers, Soak
from bench.campaigns.soak.memory import MemoryWatch, trends
from bench.campaigns.soak.plan import KINDS, MAX_TOKENS, Plan
from examples.make_adapters import make_adapter

NUM_REQUESTS = 150
NUM_CLIENTS = 8
NAMES = [f"soak-{number}" for number in range(4)]


@pytest.fixture(scope="module")
def soak_root(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soak")
    for seed, name in enumerate(NAMES):
        make_adapter(root / name, small_model, rank=4, seed=seed)
    return root


def test_nothing_is_lost_or_wrong_while_adapters_come_and_go(small_model: Path, soak_root: Path):
    plan = Plan(0, NAMES, num_prompts=1)
    peft = Peft(small_model, soak_root)
    answers: Answers = {
        (name, text): peft.answers(name, [peft.tokenizer(text)["input_ids"]], MAX_TOKENS)[0]
        for name in NAMES
        for text in plan.prompts_of(name)
    }
    settings = ["--set=max_loras=2", "--set=max_cpu_loras=2", "--set=max_model_len=256"]
    with running_server(base_model=small_model, adapter_root=soak_root, arguments=settings) as server:
        before = main_processes(server)
        assert Counter(before.values()) == Counter(
            ["manylora serve", "tritonserver", "front end llm", "front end llm_stream", "engine"]
        )
        run = Soak(server, plan, answers)
        with MemoryWatch(before, lambda: run.num_done) as watch:
            result = run.run(NUM_REQUESTS, NUM_CLIENTS)
        assert result.faults == []
        assert server_faults(server, before) == []
        counters = status_of(server).counters
    assert result.num_operations == NUM_REQUESTS
    assert set(result.ends) == set(KINDS)
    assert result.num_compared > NUM_REQUESTS // 3
    assert result.num_ties + result.num_changed <= NUM_REQUESTS // 100
    assert result.num_repeats
    assert min(counters["host_evictions"], counters["device_evictions"], counters["cancelled"]) > 0
    assert {trend.process for trend in trends(watch.samples)} == set(before.values())
