"""The command line of serving.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.loadtest import options
from bench.loadtest.arrival import Arrival
from bench.loadtest.workload import Lengths


@pytest.fixture
def base_model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return f"--base-model={tmp_path}"


def test_without_options_base_and_adapters_are_sent_at_once(base_model: str):
    found = options.read_options([base_model])
    assert (found.targets, found.adapters, found.rounds) == (["engine"], [0, 8], 5)
    assert options.arrivals(found) == [Arrival()]
    assert options.shape(found).prompt_tokens == Lengths(64, 64)


def test_a_preset_is_a_default_that_an_option_wins_over(base_model: str):
    short = options.read_options(["--short", base_model, "--requests=3"])
    assert (short.preset, short.requests, short.rounds, short.csv) == ("short", 3, 2, None)
    assert options.read_options(["--preset=w1", base_model]).label == "w1"
    assert options.read_options(["--preset=w2", base_model]).adapters == [0]


def test_the_base_model_runs_too_unless_it_is_left_out(base_model: str):
    assert options.read_options([base_model, "--adapters=4,1"]).adapters == [0, 1, 4]
    assert options.read_options([base_model, "--adapters=4,1", "--no-base"]).adapters == [1, 4]


def test_peft_comes_last_and_once(base_model: str):
    assert options.read_options([base_model, "--peft"]).targets == ["engine", "peft"]
    assert options.read_options([base_model, "--targets=peft,engine", "--peft"]).targets == ["peft", "engine"]


def test_loads_are_sorted_and_each_there_once(base_model: str):
    rates = options.read_options([base_model, "--rates=2,0.5,2"])
    assert options.arrivals(rates) == [Arrival(rate_per_s=0.5), Arrival(rate_per_s=2.0)]
    clients = options.read_options([base_model, "--concurrency=4,1,4"])
    assert options.arrivals(clients) == [Arrival(num_clients=1), Arrival(num_clients=4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--targets=engine,vllm"], "expected some of engine, http", id="unknown target"),
        pytest.param(["--targets=engine,engine"], "each once", id="target twice"),
        pytest.param(["--targets="], "expected some of", id="no target"),
        pytest.param(["--requests=0"], "0: must be 1 or more", id="no requests"),
        pytest.param(["--requests=many"], "invalid", id="requests that are no number"),
        pytest.param(["--adapters=-1"], "-1: must be 0 or more", id="negative adapters"),
        pytest.param(["--prompt-tokens=9-3"], "expected N or LEAST-MOST", id="lengths"),
        pytest.param(["--skew=zipf"], "expected even, uniform or zipf:EXPONENT", id="skew"),
        pytest.param(["--rates=0"], "expected rates above 0", id="rate of zero"),
        pytest.param(["--rates=inf"], "expected rates above 0", id="endless rate"),
        pytest.param(["--concurrency=0"], "0: must be 1 or more", id="no clients"),
        pytest.param(["--rates=1", "--concurrency=1"], "not allowed with", id="two processes"),
        pytest.param(["--set=max_loras"], "expected KEY=VALUE", id="setting without a value"),
        pytest.param(["--url=http://host:1"], "--url needs --adapter-root", id="server without adapters"),
        pytest.param(
            ["--url=http://host:1", "--adapter-root=a", "--targets=grpc"],
            "target grpc: no --url names a server of this protocol",
            id="server of another protocol",
        ),
        pytest.param(["--base-model=/nowhere"], "no base model in /nowhere", id="no model"),
        pytest.param(["--wrong"], "unrecognized arguments: --wrong", id="unknown option"),
    ],
)
def test_a_wrong_option_ends_with_its_reason(
    arguments: list[str], message: str, base_model: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        options.read_options([base_model, *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
