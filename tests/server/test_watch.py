"""How `manylora serve` watches its models, on a real server: nothing is counted, and what hangs is found."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora import run_dir
from manylora.serve.background import RunningServer, running_server
from manylora.serve.repository import MODELS
from manylora.supervise import model_watch
from manylora.supervise.model_watch import ModelWatch
from manylora_client import Unavailable

from bench.campaigns.faults.anatomy import engine_of, stub_of
from bench.campaigns.faults.freezing import ask_until_one_waits, counted, frozen_thread
from bench.campaigns.harness import connect, status_of

WAIT_S = 120
PACE_S = 0.01
"""Between two looks; the supervisor's own are 0.25 s apart."""


@pytest.fixture
def watches(server: RunningServer) -> Iterator[dict[str, ModelWatch]]:
    watches = {model: watch_of(server, model) for model in MODELS}
    yield watches
    for watch in watches.values():
        watch.close()


def watch_of(server: RunningServer, model: str) -> ModelWatch:
    health = run_dir.health_path(server.run_dir, model)
    return ModelWatch(
        model,
        health=health,
        http=server.http,
        metrics=server.metrics,
        is_full=lambda: False,
        say=lambda text: pytest.fail(f"the watch says: {text}"),
    )


def test_a_server_that_is_watched_has_had_no_request(small_model, small_root):
    with running_server(base_model=small_model, adapter_root=small_root) as server:
        for _ in range(2):
            for model in MODELS:
                for name in ("success", "failure"):
                    assert counted(server, f"nv_inference_request_{name}", model) == 0
            counters = status_of(server).counters
            assert counters["accepted"] == counters["steps"] == counters["generated_tokens"] == 0
            look_many_times(server)


def test_a_health_check_tells_a_server_that_is_well(server, tmp_path):
    def check(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "manylora.serve.healthcheck", path]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)

    before = counted(server, "nv_inference_request_success", "llm")
    assert (check(server.run_dir).returncode, check(server.run_dir).stderr) == (0, "")
    assert counted(server, "nv_inference_request_success", "llm") == before
    assert check(tmp_path).returncode == 1
    shutil.copy(server.run_dir / "serve.json", tmp_path)
    done = check(tmp_path)
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == [
        f"{model} does not say how it is" for model in MODELS
    ]


def look_many_times(server: RunningServer) -> None:
    """As often as the supervisor in a minute; each question is asked ten times or more."""
    for model in MODELS:
        watch = watch_of(server, model)
        pace = threading.Event()
        for _ in range(240):
            assert watch.look() == ""
            pace.wait(PACE_S)
        watch.close()


def test_a_deadline_that_passes_blames_nobody(server):
    """The engine is held up, as on a busy machine, and does not say in time that it has passed."""
    with connect(server) as client, contextlib.ExitStack() as held:
        for tid in map(int, os.listdir(f"/proc/{engine_of(server)}/task")):
            held.enter_context(frozen_thread(tid))
        with pytest.raises(Unavailable) as caught:
            client.generate("The capital of France is", deadline_ms=1)
    assert caught.value.message == "deadline_ms=1 passed after 0 tokens; the engine has not come to it yet"


def test_a_front_end_that_takes_no_request_is_found(server, watches, monkeypatch):
    """Its process lives and says so, Triton calls it ready: only its first thread hangs."""
    monkeypatch.setattr(model_watch, "HUNG_ANSWERS", 3)
    answers: list[str] = []

    def ask() -> None:
        with connect(server) as client:
            answers.append(client.generate("The capital of France is", max_tokens=2).text)

    problem, end = "", time.monotonic() + WAIT_S
    with frozen_thread(stub_of(server, "llm")):
        threads = ask_until_one_waits(server, "llm", ask)
        pace = threading.Event()
        while not problem and time.monotonic() < end:
            problem = watches["llm"].look()
            assert watches["llm_stream"].look() == ""
            pace.wait(PACE_S)
    assert problem == "llm hangs: requests wait in Triton and none reaches it"
    for thread in threads:
        thread.join(WAIT_S)
    assert answers == [" Paris."] * len(threads)
