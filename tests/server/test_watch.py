"""How `manylora serve` watches its models, on a real server: nothing is counted, and what hangs is found."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.anatomy import stub_of
from faults.freezing import frozen_thread
from harness import connect, status_of
from manylora import run_dir
from manylora.serve import model_watch
from manylora.serve.background import RunningServer, running_server
from manylora.serve.model_watch import ModelWatch
from manylora.serve.repository import MODELS

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
    return ModelWatch(model, health=health, http=server.http, metrics=server.metrics)


def metrics_of(server: RunningServer) -> str:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=WAIT_S) as reply:
        return str(reply.read().decode())


def count(metrics: str, name: str, model: str = "llm") -> int:
    """The sum of one counter over all its labels but the model."""
    return sum(int(n) for n in re.findall(rf'^{name}\{{[^}}]*model="{model}"[^}}]*\}} (\d+)', metrics, re.M))


def test_a_server_that_is_watched_has_had_no_request(base_model, adapter_root):
    with running_server(base_model=base_model, adapter_root=adapter_root) as server:
        for _ in range(2):
            metrics = metrics_of(server)
            for model in MODELS:
                for name in ("success", "failure"):
                    assert count(metrics, f"nv_inference_request_{name}", model) == 0
            counters = status_of(server).counters
            assert counters["accepted"] == counters["steps"] == counters["generated_tokens"] == 0
            look_many_times(server)


def test_a_health_check_tells_a_server_that_is_well(server, tmp_path):
    def check(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "manylora.serve.healthcheck", path]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)

    before = metrics_of(server)
    assert (check(server.run_dir).returncode, check(server.run_dir).stderr) == (0, "")
    assert count(metrics_of(server), "nv_inference_request_success") == count(
        before, "nv_inference_request_success"
    )
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


def test_a_front_end_that_takes_no_request_is_found(server, watches, monkeypatch):
    """Its process lives and says so, Triton calls it ready: only its first thread hangs."""
    monkeypatch.setattr(model_watch, "HUNG_ANSWERS", 3)
    answers: list[str] = []

    def ask() -> None:
        with connect(server) as client:
            answers.append(client.generate("The capital of France is", max_tokens=2).text)

    threads: list[threading.Thread] = []
    problem, end = "", time.monotonic() + WAIT_S
    with frozen_thread(stub_of(server, "llm")):
        # Triton may hand the first ones over together; what comes later waits in Triton.
        while not count(metrics_of(server), "nv_inference_pending_request_count"):
            assert time.monotonic() < end
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
        pace = threading.Event()
        while not problem and time.monotonic() < end:
            problem = watches["llm"].look()
            assert watches["llm_stream"].look() == ""
            pace.wait(PACE_S)
    assert problem == "llm hangs: requests wait in Triton and none reaches it"
    for thread in threads:
        thread.join(WAIT_S)
    assert answers == [" Paris."] * len(threads)
