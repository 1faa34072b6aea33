"""The engine process, its launcher and its keeper, on a tiny random model."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from manylora import launch, run_dir
from manylora.config import EngineConfig
from manylora.errors import InternalError, InvalidArgumentError, UnavailableError
from manylora.ipc import EngineConnection, Event, query_status
from manylora.launch import EngineKeeper, EngineProcess
from manylora.messages import Generate, SamplingParams

WAIT_S = 120


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return run_dir.socket_path(run_dir.prepare(tmp_path / "run"), "llm")


@pytest.fixture
def config(tiny_model: Callable[..., Path]) -> EngineConfig:
    return EngineConfig(
        base_model=str(tiny_model("llama")), max_loras=1, max_lora_rank=16, num_threads=1, device="cpu"
    )


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EngineProcess]]:
    """What a test starts; none may outlive it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started: list[EngineProcess] = []
    yield started
    for process in started:
        process.stop()


def start(processes: list[EngineProcess], config: EngineConfig, path: Path) -> EngineProcess:
    processes.append(EngineProcess(config, path))
    return processes[-1]


def test_it_serves_its_socket_until_its_input_ends(
    processes: list[EngineProcess], config: EngineConfig, path: Path
) -> None:
    process = start(processes, config, path)
    process.wait_ready()
    assert query_status(path, WAIT_S).gauges["running"] == 0
    # The same socket is not served twice.
    second = start(processes, config, path)
    with pytest.raises(UnavailableError, match="another engine serves it"):
        second.wait_ready()
    assert query_status(path, WAIT_S).check_errors == []
    assert process.stop() == 0
    assert not path.exists()


def test_sigterm_ends_it_in_order_and_its_requests_with_unavailable(
    processes: list[EngineProcess], config: EngineConfig, path: Path
) -> None:
    process = start(processes, config, path)
    process.wait_ready()
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    connection = EngineConnection(path, on_events=events.put, on_lost=lambda: events.put([]))
    assert connection.wait_ready(WAIT_S)
    connection.send(Generate(id=1, input_ids=[5], params=SamplingParams(max_tokens=250, ignore_eos=True)))
    events.get(timeout=WAIT_S)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 0
    last: list[Event] = []
    while batch := events.get(timeout=WAIT_S):
        last = batch
    connection.close()
    assert (last[-1].code if hasattr(last[-1], "code") else last[-1].finish_reason) in (
        "UNAVAILABLE",
        "length",
    )


def test_its_own_error_comes_back_from_a_failed_start(
    processes: list[EngineProcess], config: EngineConfig, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    process = start(processes, EngineConfig(base_model=str(tmp_path / "empty"), device="cpu"), path)
    with pytest.raises(InvalidArgumentError, match="empty"):
        process.wait_ready()
    assert process.wait() == 1
    assert not path.exists()


def test_an_unexpected_error_comes_back_as_internal(
    processes: list[EngineProcess], config: EngineConfig, path: Path, tmp_path: Path
) -> None:
    # No directory to put the lock into: nothing that the engine checks.
    process = start(processes, config, tmp_path / "absent" / "llm.sock")
    with pytest.raises(InternalError, match="could not start"):
        process.wait_ready()


def test_stopping_it_while_it_loads_ends_it_at_once(
    processes: list[EngineProcess], config: EngineConfig, path: Path
) -> None:
    process = start(processes, config, path)
    process.stop()
    with pytest.raises(UnavailableError, match="before it was ready"):
        process.wait_ready()


def test_it_does_not_outlive_an_owner_that_was_killed(config: EngineConfig, path: Path) -> None:
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from manylora.launch import EngineProcess;"
            "from manylora.config import EngineConfig;"
            "p = EngineProcess(EngineConfig.from_json(sys.argv[1]), Path(sys.argv[2])); p.wait_ready();"
            "print(p.pid, flush=True); time.sleep(600)",
            config.to_json(),
            str(path),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=launch.environment(),
    )
    assert owner.stdout
    pid = int(owner.stdout.readline())
    watch = os.pidfd_open(pid)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_for_end(watch)
    assert not path.exists()


def test_a_killed_engine_is_started_again_and_found_again(
    config: EngineConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keeper = EngineKeeper(config, path)
    losses: queue.SimpleQueue[None] = queue.SimpleQueue()
    keeper.start()
    connection = EngineConnection(path, on_events=lambda events: None, on_lost=lambda: losses.put(None))
    try:
        assert connection.wait_ready(WAIT_S)
        first = keeper.pid
        assert first
        os.kill(first, signal.SIGKILL)
        losses.get(timeout=WAIT_S)
        assert connection.wait_ready(WAIT_S)
        assert keeper.pid not in (None, first)
        assert query_status(path, WAIT_S).check_errors == []
    finally:
        connection.close()
        keeper.stop()
    assert losses.empty()
    assert not path.exists()


def test_a_first_start_that_fails_is_not_tried_again(path: Path, tmp_path: Path) -> None:
    keeper = EngineKeeper(EngineConfig(base_model=str(tmp_path / "absent"), device="cpu"), path)
    with pytest.raises(InvalidArgumentError, match="no such directory"):
        keeper.start()
    keeper.stop()


@pytest.mark.parametrize("order", ["", "not json\n", "{}"], ids=["nothing", "no json", "no end of line"])
def test_without_a_readable_order_it_says_so(order: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "manylora.engine.process"],
        input=order,
        capture_output=True,
        text=True,
        env=launch.environment(),
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("manylora.engine.process: ")


def test_the_interpreter_is_this_environments_also_in_a_program_that_embeds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = Path(launch.python_executable())
    monkeypatch.setattr(sys, "executable", "/opt/tritonserver/backends/python/triton_python_backend_stub")
    assert Path(launch.python_executable()).resolve() == expected.resolve()
    assert Path(launch.python_executable()).parent == Path(sys.prefix) / "bin"


def test_the_environment_finds_our_packages_and_leaves_out_tritons_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(
        "LD_LIBRARY_PATH", "/x/nvidia_pytriton.libs:/usr/local/nvidia/lib::/opt/tritonserver/lib"
    )
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = launch.environment()
    assert environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib"
    assert environment["PYTHONPATH"].endswith(":/somewhere")
    found = subprocess.run(
        [
            launch.python_executable(),
            "-c",
            "import json, manylora, manylora_kernels; print(json.dumps(manylora.__file__))",
        ],
        env={**environment, "LD_LIBRARY_PATH": ""},
        cwd="/",
        capture_output=True,
        check=True,
        timeout=WAIT_S,
    )
    assert Path(json.loads(found.stdout)).parent == Path(launch.__file__).parent


def wait_for_end(pidfd: int) -> None:
    """Wait until the process behind a pidfd, which need not be a child, has ended."""
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(WAIT_S * 1000)
    os.close(pidfd)
