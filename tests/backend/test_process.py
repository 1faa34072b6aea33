"""The engine process and its keeper, on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import manylora
import pytest
from manylora import run_dir
from manylora.config import EngineConfig
from manylora.errors import InternalError, InvalidArgumentError, UnavailableError
from manylora.ipc import EngineConnection, Event, query_status
from manylora.messages import Failed, Generate, SamplingParams
from manylora.supervise import engine_process, pulse
from manylora.supervise.engine_keeper import EngineKeeper
from manylora.supervise.engine_process import EngineProcess

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
            "import sys, time; from pathlib import Path;"
            "from manylora.supervise.engine_process import EngineProcess;"
            "from manylora.config import EngineConfig;"
            "p = EngineProcess(EngineConfig.from_json(sys.argv[1]), Path(sys.argv[2])); p.wait_ready();"
            "print(p.pid, flush=True); time.sleep(600)",
            config.to_json(),
            str(path),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=engine_process.environment(),
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


def test_a_pinned_adapter_that_broke_on_disk_fails_alone_when_the_engine_is_started_again(
    config: EngineConfig,
    path: Path,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = tmp_path / "adapters"
    for seed, name in enumerate(("pinned", "other")):
        make_adapter(Path(config.base_model), root / name, seed, r=4, target_modules=["q_proj"])
    config = dataclasses.replace(
        config,
        adapter_root=str(root),
        max_loras=2,
        pinned_adapters=("pinned",),
        preload_adapters=("other", "pinned"),
    )
    tensors = root / "pinned" / "adapter_model.safetensors"
    sound = tensors.read_bytes()
    keeper = EngineKeeper(config, path)
    seen: queue.SimpleQueue[list[Event] | None] = queue.SimpleQueue()

    def ask(number: int, adapter: str) -> Event:
        params = SamplingParams(max_tokens=1)
        connection.send(Generate(id=number, input_ids=[5], adapter_id=adapter, params=params))
        events = seen.get(timeout=WAIT_S)
        assert events
        return events[-1]

    tensors.write_bytes(b"no tensors")
    with pytest.raises(InvalidArgumentError, match="adapter 'pinned'"):
        keeper.start()
    keeper.stop()
    tensors.write_bytes(sound)
    keeper = EngineKeeper(config, path)
    keeper.start()
    connection = EngineConnection(path, on_events=seen.put, on_lost=lambda: seen.put(None))
    try:
        assert connection.wait_ready(WAIT_S)
        assert keeper.pid
        tensors.write_bytes(b"no tensors")
        os.kill(keeper.pid, signal.SIGKILL)
        assert seen.get(timeout=WAIT_S) is None
        assert connection.wait_ready(WAIT_S)
        status = query_status(path, WAIT_S)
        assert {s.name: s.state for s in status.adapters} == {"other": "host", "pinned": "failed"}
        failed = ask(1, "pinned")
        assert isinstance(failed, Failed)
        assert failed.code == "INVALID_ARG"
        assert failed.message.startswith("adapter 'pinned': ")
        for number, adapter in ((2, "other"), (3, "")):
            assert not isinstance(ask(number, adapter), Failed)
        assert query_status(path, WAIT_S).check_errors == []
    finally:
        connection.close()
        keeper.stop()


def test_a_stopped_engine_is_killed_and_started_again(
    config: EngineConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keeper = EngineKeeper(config, path)
    seen: queue.SimpleQueue[list[Event] | None] = queue.SimpleQueue()
    keeper.start()
    connection = EngineConnection(path, on_events=seen.put, on_lost=lambda: seen.put(None))
    try:
        assert connection.wait_ready(WAIT_S)
        first = keeper.pid
        assert first
        connection.send(Generate(id=1, input_ids=[5], params=SamplingParams(max_tokens=250, ignore_eos=True)))
        assert seen.get(timeout=WAIT_S)
        os.kill(first, signal.SIGSTOP)
        while seen.get(timeout=WAIT_S) is not None:
            pass
        assert connection.wait_ready(WAIT_S)
        assert keeper.pid not in (None, first)
        # Nothing of the first one's answer reaches whoever asks the second.
        connection.send(Generate(id=2, input_ids=[5], params=SamplingParams(max_tokens=1)))
        events = seen.get(timeout=WAIT_S)
        assert events
        assert [event.id for event in events] == [2]
    finally:
        connection.close()
        keeper.stop()


def test_an_engine_that_is_stopped_while_it_starts_is_killed(
    processes: list[EngineProcess], config: EngineConfig, path: Path
) -> None:
    process = start(processes, config, path)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(UnavailableError, match="ended with status -9 before it was ready"):
        process.wait_ready()


def test_an_owner_that_was_stopped_too_finds_the_engine_well(
    processes: list[EngineProcess], config: EngineConfig, path: Path
) -> None:
    # As when a whole machine sleeps: what the owner missed meanwhile is no silence of the engine.
    process = start(processes, config, path)
    process.wait_ready()
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGCONT)
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    waiter = threading.Thread(target=lambda: ended.put(process.wait()))
    waiter.start()
    assert query_status(path, WAIT_S).check_errors == []
    with pytest.raises(queue.Empty):
        ended.get(timeout=2 * pulse.MAX_STOPPED_TURNS * pulse.BEAT_S)
    assert process.stop() == 0
    waiter.join()


HANGING_ENGINE = """
import sys, threading
from manylora.engine import process
from manylora.supervise import hang_detector
from manylora.engine.steps import Steps
from manylora.engine.server import EngineServer
hang_detector.MAX_BLOCKED_LOOKS = 2
hang = threading.Event().wait
if sys.argv[1] == "engine":
    Steps._launch = lambda self, schedule, is_ahead: hang()
elif sys.argv[1] == "socket":
    EngineServer._take = lambda self, peer, frame: hang()
else:
    EngineServer._take = lambda self, peer, frame: 1 / 0
sys.exit(process.main())
"""
"""An engine process, in which a thread deadlocks or dies when the first request comes."""


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("engine", "the engine's thread hangs"),
        ("socket", "the socket's thread hangs"),
        ("dead socket", "the socket's thread has ended by itself"),
    ],
)
def test_an_engine_process_whose_thread_hangs_or_dies_ends_by_itself(
    fault: str, word: str, config: EngineConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    order = {"socket": str(path), "config": json.loads(config.to_json())}
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING_ENGINE, fault],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=engine_process.environment(),
    )
    lost = threading.Event()
    connection = EngineConnection(path, on_events=lambda events: None, on_lost=lost.set)
    try:
        assert process.stdin
        assert process.stderr
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        if fault == "engine":
            assert connection.wait_ready(WAIT_S)
            connection.send(Generate(id=1, input_ids=[5]))
            assert lost.wait(WAIT_S)
        said = process.stderr.read()
        assert process.wait(WAIT_S) == 1
    finally:
        connection.close()
        process.kill()
        process.communicate()
    assert word in said
    if "hangs" in word:
        # Where every thread stood.
        assert "most recent call first" in said


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
        env=engine_process.environment(),
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("manylora.engine.process: ")


def test_the_interpreter_is_this_environments_also_in_a_program_that_embeds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = Path(engine_process.python_executable())
    monkeypatch.setattr(sys, "executable", "/opt/tritonserver/backends/python/triton_python_backend_stub")
    assert Path(engine_process.python_executable()).resolve() == expected.resolve()
    assert Path(engine_process.python_executable()).parent == Path(sys.prefix) / "bin"


def test_the_environment_finds_our_packages_and_leaves_out_tritons_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(
        "LD_LIBRARY_PATH", "/x/nvidia_pytriton.libs:/usr/local/nvidia/lib::/opt/tritonserver/lib"
    )
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = engine_process.environment()
    assert environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib"
    assert environment["PYTHONPATH"].endswith(":/somewhere")
    found = subprocess.run(
        [
            engine_process.python_executable(),
            "-c",
            "import json, manylora, manylora_kernels; print(json.dumps(manylora.__file__))",
        ],
        env={**environment, "LD_LIBRARY_PATH": ""},
        cwd="/",
        capture_output=True,
        check=True,
        timeout=WAIT_S,
    )
    assert Path(json.loads(found.stdout)).parent == Path(manylora.__file__).parent


def wait_for_end(pidfd: int) -> None:
    """Wait until the process behind a pidfd, which need not be a child, has ended."""
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(WAIT_S * 1000)
    os.close(pidfd)
