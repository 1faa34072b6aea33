"""`manylora serve` as a program: what it refuses, what it restarts, what it leaves behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from manylora.errors import UnavailableError
from manylora.serve import preflight, processes, repository
from manylora.serve.background import RunningServer, running_server
from manylora.serve.command import add_arguments, read_settings
from manylora.serve.installation import Installation, find_installation
from manylora.serve.ports import Ports, hold
from tritonclient.grpc import model_config_pb2
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import shared_memory as shm

from bench.campaigns.faults import doors
from bench.campaigns.faults.anatomy import descendants, shared_memory_of, stub_below, stub_of, wait_until_gone
from bench.campaigns.faults.silent_mount import may_mount, silent_mount
from bench.campaigns.harness import Peft

TIMEOUT_S = 180
PROMPT = "The capital of France is"


def manylora(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manylora.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def ask(server: RunningServer, model: str = "llm", **parameters: object) -> dict[str, object]:
    verb = "generate_stream" if model == "llm_stream" else "generate"
    body = json.dumps({"text_input": PROMPT, "max_tokens": 4, **parameters}).encode()
    request = urllib.request.Request(f"http://{server.http}/v2/models/{model}/{verb}", body)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
        text = reply.read().decode().strip()
    if model == "llm":
        return dict(json.loads(text))
    events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")]
    return {**events[-1], "text_output": "".join(event["text_output"] for event in events)}


@pytest.mark.parametrize("key", ["base_model", "adapter_root"])
def test_a_folder_that_gives_no_answer_is_named(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not may_mount():
        pytest.skip("only root may mount a file system that gives no answer")
    monkeypatch.setattr(preflight, "ANSWER_S", 0.5)
    folders = {"base_model": "/", "adapter_root": "/", key: str(tmp_path)}
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args([f"--set={name}={folder}" for name, folder in folders.items()])
    with silent_mount(tmp_path), pytest.raises(UnavailableError) as error:
        read_settings(arguments)
    assert error.value.message == f"{key}='{tmp_path}': the file system gives no answer within 0.5 s"


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
        pytest.param(
            ["--allow", "trace,nosuch"],
            "--allow 'nosuch': allowed are shared-memory, trace, logging, model-repository",
            id="no-interface",
        ),
        pytest.param(
            ["--shared-memory-bytes", "1K"], "--shared-memory-bytes 1024: must be at least", id="no-memory"
        ),
        pytest.param(["--shared-memory-bytes", "lots"], "='lots': expected ", id="no-size"),
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
    in_use = rf"--grpc-port {port} on 127.0.0.1: Address already in use \(by --http-port\)"
    with pytest.raises(UnavailableError, match=in_use), hold(twice):
        pass


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
    ],
)
def test_a_port_is_kept_from_servers_on_every_address_that_meets_it(first, second, meet):
    with hold(Ports(host=first, http=0, grpc=0, metrics=0)) as held:
        same = hold(Ports(host=second, http=held.http, grpc=0, metrics=0))
        if meet:
            with pytest.raises(UnavailableError, match="another `manylora serve` has it"), same:
                pass
        else:
            with same as found:
                assert found.http == held.http


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


FREE_PORTS = ("--http-port=0", "--grpc-port=0", "--metrics-port=0")


def refused(done: subprocess.CompletedProcess[str], message: str) -> bool:
    """Whether a start was refused in one line, before tritonserver was started."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("manylora serve: ")
    assert done.stdout == ""
    assert done.returncode in (1, 2)
    assert message in lines[0]
    return True


def looks_like_a_model(folder: Path) -> Path:
    """What a glance takes for a base model."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").touch()
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda base: (base / "config.json").unlink(), "it has no config.json", id="no-config"),
        pytest.param(
            lambda base: (base / "config.json").write_text("{"), "its config.json is not JSON: ", id="no-json"
        ),
        pytest.param(
            lambda base: (base / "config.json").write_text("[]"), "has no model_type", id="another-json"
        ),
        pytest.param(
            lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
            "it has no file *.safetensors",
            id="no-weights",
        ),
        pytest.param(lambda base: (base / "tokenizer.json").unlink(), "no tokenizer: ", id="no-tokenizer"),
    ],
)
def test_a_directory_that_is_no_base_model_is_refused_at_once(change, message, tmp_path):
    base = looks_like_a_model(tmp_path / "base")
    change(base)
    assert refused(manylora("serve", "--base-model", base, *FREE_PORTS), f"base_model={str(base)!r}: ")
    assert refused(manylora("serve", "--base-model", base, *FREE_PORTS), message)


@pytest.mark.parametrize("key", ["preload_adapters", "pinned_adapters"])
def test_an_adapter_to_be_loaded_that_is_not_there_is_refused_at_once(key, tmp_path):
    base = looks_like_a_model(tmp_path / "base")
    (tmp_path / "root" / "half").mkdir(parents=True)
    (tmp_path / "root" / "half" / "adapter_config.json").touch()
    words = ("serve", "--base-model", base, "--adapter-root", tmp_path / "root", *FREE_PORTS)
    assert refused(manylora(*words, "--set", f"{key}=none"), f"{key}: adapter 'none' is not found")
    message = f"{key}: adapter 'half' has no adapter_model.safetensors"
    assert refused(manylora(*words, "--set", f"{key}=half"), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused_at_once(device, tmp_path):
    base = looks_like_a_model(tmp_path / "base")
    done = manylora("serve", "--base-model", base, *FREE_PORTS, "--set", f"device={device}")
    assert refused(done, f"device={device!r}: torch {torch.__version__} finds no CUDA device")


@pytest.mark.parametrize(
    ("mounted", "size", "message"),
    [
        pytest.param("run", "64k", "No space left on device; 1.0 MiB are needed", id="run-dir"),
        pytest.param("/dev/shm", "1m", "No space left on device; 4.0 MiB are needed", id="shared-memory"),
        pytest.param("run", "64k,ro", "Read-only file system", id="read-only"),
    ],
)
def test_a_full_disk_is_named_at_once(mounted, size, message, tmp_path):
    (tmp_path / "run").mkdir(mode=0o700)
    script = 'mount -t tmpfs -o "mode=700,size=$1" tmpfs "$2" && shift 2 && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", script, "sh", size, str(tmp_path / mounted)]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    base = looks_like_a_model(tmp_path / "base")
    serve = [sys.executable, "-m", "manylora.cli", "serve", "--base-model", base, *FREE_PORTS]
    command = [*words, *serve, "--run-dir", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert refused(done, message)


def test_a_run_directory_whose_name_is_not_utf8_is_refused(tmp_path):
    base = looks_like_a_model(tmp_path / "base")
    done = manylora("serve", "--base-model", base, *FREE_PORTS, "--run-dir", os.fsdecode(b"/tmp/\xff"))
    assert refused(done, r"--run-dir='/tmp/\udcff': its name is not UTF-8")


def test_a_model_that_does_not_load_says_why_and_leaves_nothing(tmp_path):
    base = looks_like_a_model(tmp_path / "base")
    (base / "config.json").write_text('{"model_type": "no_such_model"}')
    done = manylora("serve", "--base-model", base, *FREE_PORTS, "--run-dir", tmp_path / "run")
    assert done.returncode == 1
    assert "tritonserver did not start" in done.stderr
    assert "[INVALID_ARG]" in done.stderr
    assert str(tmp_path) in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["server.log"]


def test_a_front_end_that_dies_at_once_ends_the_start_with_its_last_words(tmp_path):
    """It has ended before anybody can look at it, and tritonserver would wait for it for ever."""
    found = find_installation()
    broken = tmp_path / "tritonserver"
    (broken / "backends" / "python").mkdir(parents=True)
    for name in ("bin", "lib", "python"):
        if (found.root / name).exists():
            (broken / name).symlink_to(found.root / name)
    for path in (found.backends / "python").iterdir():
        (broken / "backends" / "python" / path.name).symlink_to(path)
    stub = Installation(root=broken).stub
    stub.unlink()
    library = f"-lpython{sys.version_info.major}.{sys.version_info.minor}"
    program = '#include <stdio.h>\nint main() { fputs("my last words\\n", stderr); return 3; }'
    subprocess.run(
        ["gcc", "-x", "c", "-", "-x", "none", "-o", stub, "-Wl,--no-as-needed",
         f"-L{sysconfig.get_config_var('LIBDIR')}", library],
        input=program, text=True, check=True,
    )  # fmt: skip
    base = looks_like_a_model(tmp_path / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{broken / 'bin'}:{os.environ['PATH']}")
        done = manylora("serve", "--base-model", base, *FREE_PORTS, "--ready-timeout=100")
    assert done.returncode == 1
    assert "a model's process has died" in done.stderr
    assert "\nmy last words\n" in done.stderr
    assert "not ready in" not in done.stderr


def test_a_tritonserver_on_the_path_may_be_a_link_with_its_backends_beside_it(tmp_path, monkeypatch):
    """As set-up leaves it, and as a package may link it into /usr/local/bin."""
    beside_link, beside_binary, real, linked = (tmp_path / name for name in "abcd")
    for root in (beside_link, beside_binary, real, linked):
        (root / "bin").mkdir(parents=True)
    for root in (real, beside_binary):
        (root / "bin" / "tritonserver").touch(mode=0o755)
    (beside_link / "bin" / "tritonserver").symlink_to(real / "bin" / "tritonserver")
    (linked / "bin" / "tritonserver").symlink_to(beside_binary / "bin" / "tritonserver")
    for root in (beside_link, beside_binary):
        stub = Installation(root=root).stub
        stub.parent.mkdir(parents=True)
        stub.touch()
    for root, found in ((beside_link, beside_link), (beside_binary, beside_binary), (linked, beside_binary)):
        monkeypatch.setenv("PATH", str(root / "bin"))
        assert find_installation().root == found


def test_a_front_end_that_dies_while_it_starts_ends_the_start(small_model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "manylora.cli",
        "serve",
        "--base-model",
        small_model,
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
        os.kill(stub_below(process.pid, "llm"), signal.SIGKILL)
        said = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 1
    assert "tritonserver did not start" in said or "has died" in said
    assert [pid for pid in pids if processes.is_alive(pid)] == []
    assert [path.name for path in tmp_path.iterdir()] == ["server.log"]


def test_sigterm_leaves_no_process_no_shared_memory_and_no_file(small_model, small_root):
    peft = Peft(small_model, small_root)
    (wanted,) = peft.answers("", [peft.tokenizer(PROMPT)["input_ids"]], 4)
    with running_server(base_model=small_model, adapter_root=small_root) as server:
        below = descendants(server.pid)
        # tritonserver, two front ends and the engine.
        assert len(below) >= 4
        regions = shared_memory_of(server)
        assert len(regions) == 2
        assert (server.run_dir / "llm.sock").is_socket()
        text = peft.tokenizer.decode(wanted.token_ids)
        assert ask(server)["text_output"] == ask(server, "llm_stream")["text_output"] == text
    assert [pid for pid in below if processes.is_alive(pid)] == []
    assert [region for region in regions if region.exists()] == []
    assert not server.run_dir.exists()


def test_a_server_elsewhere_is_found_and_what_it_allows_is_open(
    small_model, small_root, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arguments = [f"--run-dir={tmp_path / 'run'}", "--allow=shared-memory"]
    with running_server(base_model=small_model, adapter_root=small_root, arguments=arguments) as server:
        assert manylora("status").returncode == 0
        assert healthcheck().returncode == 0
        assert doors.ask_http(server, "GET", "/v2/systemsharedmemory/status") == (200, "[]")
        for path in ("/v2/logging", "/v2/trace/setting"):
            assert doors.ask_http(server, "GET", path)[0] == 403
        values = np.array([[464, 3139, 282]], np.int32)
        region = shm.create_shared_memory_region("ids", f"/{tmp_path.name}", values.nbytes)
        try:
            shm.set_shared_memory_region(region, [values])
            asked = InferInput("input_ids", values.shape, "INT32")
            with contextlib.closing(InferenceServerClient(server.http)) as client:
                answers = []
                for is_shared in (False, True):
                    asked.set_data_from_numpy(values)
                    if is_shared:
                        client.register_system_shared_memory("ids", f"/{tmp_path.name}", values.nbytes)
                        asked.set_shared_memory("ids", values.nbytes)
                    answer = client.infer("llm", [asked], parameters={"max_tokens": 4})
                    answers.append(answer.as_numpy("output_ids").tolist())
        finally:
            shm.destroy_shared_memory_region(region)
        assert answers[0] == answers[1]
    assert healthcheck().returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def healthcheck() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manylora.serve.healthcheck"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def test_a_killed_serve_takes_its_server_with_it(small_model, small_root, tmp_path):
    run_dir = f"--run-dir={tmp_path / 'run'}"
    with running_server(base_model=small_model, adapter_root=small_root, arguments=[run_dir]) as server:
        below = descendants(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        wait_until_gone(below)


@pytest.mark.slow
def test_a_killed_front_end_is_restarted_and_answers(small_model, small_root):
    read_end, write_end = os.pipe()
    with (
        os.fdopen(read_end) as messages,
        os.fdopen(write_end, "w") as stderr,
        running_server(base_model=small_model, adapter_root=small_root, stderr=stderr) as server,
    ):
        before = {model: ask(server, model, adapter_id="synthetic-000") for model in repository.MODELS}
        for model in repository.MODELS:
            below = descendants(server.pid)
            stub = stub_of(server, model)
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
