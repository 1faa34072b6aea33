"""`manylora serve` as a program: what it refuses, what it restarts, what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from faults.anatomy import descendants, shared_memory_of, wait_until_gone
from google.protobuf import text_format
from manylora.errors import UnavailableError
from manylora.serve import processes, repository
from manylora.serve.background import RunningServer, running_server
from manylora.serve.ports import Ports, hold
from tritonclient.grpc import model_config_pb2

TIMEOUT_S = 180


def manylora(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manylora.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def ask(server: RunningServer, model: str = "llm", **parameters: object) -> dict[str, object]:
    verb = "generate_stream" if model == "llm_stream" else "generate"
    body = json.dumps({"text_input": "The capital of France is", "max_tokens": 4, **parameters}).encode()
    request = urllib.request.Request(f"http://{server.http}/v2/models/{model}/{verb}", body)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
        text = reply.read().decode().strip()
    if model == "llm":
        return dict(json.loads(text))
    events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")]
    return {**events[-1], "text_output": "".join(event["text_output"] for event in events)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--set", "max_lora=3"], "unknown configuration key max_lora;", id="unknown-key"),
        pytest.param(
            ["--set", "no_such_key="], "unknown configuration key no_such_key;", id="unknown-key-empty"
        ),
        pytest.param(["--set", "max_loras=many"], "max_loras='many': expected an integer", id="wrong-type"),
        pytest.param(["--set", "max_loras=0"], "max_loras=0: must be at least 1", id="out-of-range"),
        pytest.param(["--set", "max_loras"], "--set 'max_loras': expected KEY=VALUE", id="no-value"),
        pytest.param(
            ["--set", "dtype=float32", "--set", "dtype=float16"],
            "dtype is given already, as 'float32'",
            id="twice",
        ),
        pytest.param(
            ["--set", "tensor_parallel_size=2"], "tensor parallelism is not served yet", id="unsupported"
        ),
        pytest.param(
            ["--adapter-root", "/no/such"], "adapter_root='/no/such': no such directory", id="no-adapters"
        ),
        pytest.param(["--host", "192.0.2.1"], "--http-port 8000 on 192.0.2.1: ", id="foreign-host"),
        pytest.param(["--http-port", "65536"], "65536 is no port: 0 to 65535", id="no-port"),
        pytest.param(["--run-dir", "/tmp/" + "x" * 100], "allowed are 107", id="long-run-dir"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(words, message, tmp_path):
    done = manylora("serve", "--base-model", tmp_path, "--grpc-port", "0", "--metrics-port", "0", *words)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "starting" not in done.stderr


def test_a_missing_base_model_is_named():
    assert "base_model='/no/such': no such directory" in manylora("serve", "--base-model", "/no/such").stderr
    assert "give --base-model DIR" in manylora("serve").stderr


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_port_in_use_is_named(name, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        free = [f"--{each}-port=0" for each in ("http", "grpc", "metrics") if each != name]
        done = manylora("serve", "--base-model", tmp_path, f"--{name}-port={port}", *free)
    assert done.returncode == 1
    assert (
        f"--{name}-port {port} on 127.0.0.1: Address already in use; give another port, or 0" in done.stderr
    )


def test_a_run_directory_that_others_can_open_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_dir.chmod(0o755)
    done = manylora("serve", "--base-model", tmp_path, "--http-port=0", "--grpc-port=0", "--metrics-port=0",
                    "--run-dir", run_dir)  # fmt: skip
    assert done.returncode == 2
    assert "has mode 0755; others must be shut out" in done.stderr


def test_free_ports_differ_and_are_kept_where_given():
    with hold(Ports(host="127.0.0.1", http=0, grpc=0, metrics=0)) as first:
        pass
    assert len({first.http, first.grpc, first.metrics}) == 3
    with hold(first) as again:
        assert again == first
    assert again.address(1) == "127.0.0.1:1"
    assert Ports(host="::", http=0, grpc=0, metrics=0).address(8000) == "[::1]:8000"


def test_the_same_port_twice_is_refused():
    with hold(Ports(host="127.0.0.1", http=0, grpc=0, metrics=0)) as free:
        port = free.http
    twice = Ports(host="127.0.0.1", http=port, grpc=port, metrics=0)
    in_use = f"--grpc-port {port} on 127.0.0.1: Address already in use"
    with pytest.raises(UnavailableError, match=in_use), hold(twice):
        pass


def test_settings_stand_in_the_engines_model_only(tmp_path):
    settings = {"base_model": '/models/a "b"\n', "max_loras": "3", "adapter_root": ""}
    repository.render(tmp_path, settings, tmp_path / "run")
    configs = {
        model: text_format.Parse(
            (tmp_path / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
        )
        for model in repository.MODELS
    }
    parameters = {
        model: {key: value.string_value for key, value in config.parameters.items()}
        for model, config in configs.items()
    }
    run_dir = str(tmp_path / "run")
    assert parameters == {
        "llm": {"base_model": '/models/a "b"\n', "max_loras": "3", "run_dir": run_dir},
        "llm_stream": {"engine_model": "llm", "run_dir": run_dir},
    }
    for config in configs.values():
        assert config.max_batch_size == 64
        assert config.dynamic_batching.max_queue_delay_microseconds == 1000
        assert not config.dynamic_batching.HasField("default_queue_policy")
    assert configs["llm_stream"].model_transaction_policy.decoupled
    assert not configs["llm"].model_transaction_policy.decoupled
    assert configs["llm"].input == configs["llm_stream"].input
    assert configs["llm"].output == configs["llm_stream"].output


def test_a_model_that_does_not_load_says_why_and_leaves_nothing(tmp_path):
    done = manylora("serve", "--base-model", tmp_path, "--http-port=0", "--grpc-port=0", "--metrics-port=0",
                    "--run-dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 1
    assert "tritonserver did not start" in done.stderr
    assert "[INVALID_ARG]" in done.stderr
    assert str(tmp_path) in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["server.log"]


def test_a_front_end_that_dies_while_it_starts_ends_the_start(base_model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "manylora.cli",
        "serve",
        "--base-model",
        base_model,
        "--run-dir",
        tmp_path,
    ]
    command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    tmp_path.chmod(0o700)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # Once it has shown that it starts the engine, long before that one is ready.
        while not (tmp_path / "llm.owner").exists():
            assert process.poll() is None
        pids = descendants(process.pid)
        (stub,) = (pid for pid in pids if any("/llm/1/model.py" in word for word in processes.command(pid)))
        os.kill(stub, signal.SIGKILL)
        said = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 1
    assert "tritonserver did not start" in said or "has died" in said
    assert [pid for pid in pids if processes.is_alive(pid)] == []
    assert [path.name for path in tmp_path.iterdir()] == ["server.log"]


def test_sigterm_leaves_no_process_no_shared_memory_and_no_file(base_model, adapter_root):
    with running_server(base_model=base_model, adapter_root=adapter_root) as server:
        below = descendants(server.pid)
        # tritonserver, two front ends and the engine.
        assert len(below) >= 4
        regions = shared_memory_of(server)
        assert len(regions) == 2
        assert (server.run_dir / "llm.sock").is_socket()
        assert ask(server)["text_output"] == ask(server, "llm_stream")["text_output"] == " Paris.\n\n"
    assert [pid for pid in below if processes.is_alive(pid)] == []
    assert [region for region in regions if region.exists()] == []
    assert not server.run_dir.exists()


def test_a_killed_serve_takes_its_server_with_it(base_model, adapter_root, tmp_path):
    run_dir = f"--run-dir={tmp_path / 'run'}"
    with running_server(base_model=base_model, adapter_root=adapter_root, arguments=[run_dir]) as server:
        below = descendants(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        wait_until_gone(below)


def test_a_killed_front_end_is_restarted_and_answers(base_model, adapter_root):
    read_end, write_end = os.pipe()
    with (
        os.fdopen(read_end) as messages,
        os.fdopen(write_end, "w") as stderr,
        running_server(base_model=base_model, adapter_root=adapter_root, stderr=stderr) as server,
    ):
        before = {model: ask(server, model, adapter_id="synthetic-000") for model in repository.MODELS}
        for model in repository.MODELS:
            below = descendants(server.pid)
            (stub,) = (
                pid for pid in below if any(f"/{model}/1/model.py" in word for word in processes.command(pid))
            )
            regions = shared_memory_of(server)
            os.kill(stub, signal.SIGKILL)
            told = [next(line for line in messages if word in line) for word in ("has died", "ready again")]
            assert str(stub) in told[0]
            after = {each: ask(server, each, adapter_id="synthetic-000") for each in repository.MODELS}
            assert after == before
            assert [pid for pid in below if processes.is_alive(pid)] == []
            assert [region for region in regions if region.exists()] == []
            assert {stat.S_IMODE(region.stat().st_mode) for region in shared_memory_of(server)} == {0o600}


def test_status_shows_the_adapters_that_were_used(server):
    ask(server, adapter_id="synthetic-001")
    shown = manylora("status", "--run-dir", server.run_dir)
    assert shown.returncode == 0
    assert "synthetic-001" in shown.stdout
    status = json.loads(manylora("status", "--json", "--run-dir", server.run_dir).stdout)
    assert status["check_errors"] == []
    assert "synthetic-001" in [adapter["name"] for adapter in status["adapters"] if adapter["rank"] == 16]


def test_status_without_a_server_says_so(tmp_path):
    done = manylora("status", "--run-dir", tmp_path)
    assert done.returncode == 1
    assert "no engine" in done.stderr
