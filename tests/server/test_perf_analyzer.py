"""perf_analyzer on the running server, in each of the ways of bench/perf_analyzer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from manylora.serve.background import RunningServer

from bench.campaigns.harness import connect, wait_idle
from bench.paths import ROOT

SCRIPTS = ROOT / "bench" / "perf_analyzer"
COMMAND = ROOT / ".build" / "perf_analyzer" / "perf_analyzer"
DONE_S = 900
"""Longest that a run of a few requests may take, on a machine that does much else."""

pytestmark = pytest.mark.skipif(
    not COMMAND.is_file(), reason="perf_analyzer is missing: run python bench/perf_analyzer/install.py"
)


def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command, with standard error among its output."""
    return subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=DONE_S,
        check=False,
    )


def assert_serves(server: RunningServer) -> None:
    """The server has nothing left over, and answers."""
    wait_idle(server)
    with connect(server) as client:
        assert client.generate("The sea is", adapter_id="pirate", max_tokens=2).num_output_tokens == 2


@pytest.mark.parametrize(
    ("way", "protocol"),
    [
        pytest.param(["one-adapter", "--adapter=pirate"], "grpc", id="stream, request parameter"),
        pytest.param(["tensor-mix", "--protocol=http"], "http", id="HTTP, tensor"),
        pytest.param(["tensor-mix", "--protocol=grpc"], "grpc", id="gRPC, tensor"),
        pytest.param(["tensor-mix", "--model=llm_stream"], "grpc", id="stream, tensor"),
        pytest.param(["parameter-mix"], "http", id="generate_stream, request parameters"),
    ],
)
def test_each_way_gets_every_answer_from_the_adapter_it_asked_for(
    server: RunningServer, tmp_path: Path, way: list[str], protocol: str
) -> None:
    mix = [] if way[0] == "one-adapter" else ["--adapters=@base,pirate,haiku,synthetic-000", "--skew=1"]
    url = server.http if protocol == "http" else server.grpc
    load = ["--concurrency=8", "--requests=16", "--prompt-words=8", "--max-tokens=4"]
    done = call(sys.executable, SCRIPTS / "run.py", *way, *mix, f"--url={url}", *load, f"--keep={tmp_path}")
    # It compares each answer's adapter version and length with what was asked, and fails where they differ.
    assert done.returncode == 0, done.stdout
    rows = [line.split()[:6] for line in done.stdout.splitlines() if line.startswith("concurrency ")]
    assert rows == [["concurrency", "8", "16", "0", "8", "4"]]
    read = call(sys.executable, SCRIPTS / "report.py", tmp_path / "concurrency_8.json")
    assert read.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert_serves(server)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_made_up_data_for_every_input_is_refused_and_the_server_goes_on(
    server: RunningServer, protocol: str
) -> None:
    url = server.http if protocol == "http" else server.grpc
    words = ["-m", "llm", "-u", url, "-i", protocol, "--shape", "input_ids:8", "--request-count", "4"]
    done = call(COMMAND, *words)
    assert done.returncode != 0
    assert "[INVALID_ARG] got both of text_input and input_ids; send exactly one of them" in done.stdout
    assert_serves(server)


def test_an_adapter_that_is_not_there_ends_the_run_with_its_message(server: RunningServer) -> None:
    done = call(sys.executable, SCRIPTS / "run.py", "one-adapter", "--adapter=nobody", f"--url={server.grpc}")
    assert done.returncode == 1
    assert "run: adapter 'nobody' is not found" in done.stdout
    assert_serves(server)
