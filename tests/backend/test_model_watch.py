"""How `manylora serve` tells a busy front end from a hung and a dead one."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from manylora.supervise import model_watch
from manylora.supervise.health import HealthSocket, Stage
from manylora.supervise.model_watch import ModelWatch

WAIT_S = 60
NEVER = 10**9
METRICS = """\
# HELP nv_inference_pending_request_count Instantaneous number of pending requests awaiting execution
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{{model="llm",version="1"}} {}
nv_inference_pending_request_count{{model="llm_stream",version="1"}} 7
"""


class Triton(ThreadingHTTPServer):
    """What tritonserver says of `llm`; None is no answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ready: int | None = 200
        self.metrics: str | None = METRICS.format(0)
        self.asked: list[str] = []
        self.is_over = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Triton
    protocol_version: ClassVar[str] = "HTTP/1.1"

    def do_GET(self) -> None:
        is_metrics = self.path == "/metrics"
        self.close_connection = True
        if (self.server.metrics if is_metrics else self.server.ready) is None:
            self.server.is_over.wait()
            return
        body = (self.server.metrics or "").encode() if is_metrics else b""
        self.send_response(200 if is_metrics else self.server.ready or 0)
        self.send_header("Content-Length", str(len(body)))
        # A watch that has found something hangs up.
        with contextlib.suppress(BrokenPipeError):
            self.end_headers()
            self.wfile.write(body)
        self.server.asked.append(self.path)

    def log_message(self, format: str, *args: object) -> None:
        pass


class FrontEnd:
    """Its stages, and the socket on which they are told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.execute, self.replies = Stage(), Stage()
        self.socket = HealthSocket(path, {"execute": self.execute, "replies": self.replies})


@pytest.fixture
def triton() -> Iterator[Triton]:
    with Triton() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.is_over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def front_end(tmp_path: Path) -> Iterator[FrontEnd]:
    front_end = FrontEnd(tmp_path / "llm.live")
    yield front_end
    front_end.socket.close()


@pytest.fixture
def watch(triton: Triton, front_end: FrontEnd) -> Iterator[ModelWatch]:
    address = triton.address
    watch = ModelWatch(
        "llm",
        health=front_end.path,
        http=address,
        metrics=address,
        is_full=lambda: False,
        say=pytest.fail,
    )
    yield watch
    watch.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """These looks come as fast as they can, so an answer may take any number of them."""
    monkeypatch.setattr(model_watch, "HUNG_LOOKS", NEVER)


def look_until_problem(watch: ModelWatch, meanwhile: Callable[[], object] = lambda: None) -> str:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        meanwhile()
        problem = watch.look()
        if problem:
            return problem
    raise AssertionError(f"no problem in {WAIT_S} s")


def look_for_long(watch: ModelWatch, triton: Triton, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Look until all questions have been answered several times more often than it takes to judge."""
    end = time.monotonic() + WAIT_S
    while min(map(triton.asked.count, ("/metrics", "/v2/models/llm/ready"))) < 4 * model_watch.HUNG_ANSWERS:
        assert time.monotonic() < end
        meanwhile()
        assert watch.look() == ""


@pytest.mark.usefixtures("patient")
def test_a_front_end_whose_loops_go_round_is_alive(
    watch: ModelWatch, triton: Triton, front_end: FrontEnd
) -> None:
    triton.metrics = METRICS.format(1000)

    def begin_turns() -> None:
        front_end.execute.__enter__()
        front_end.replies.__enter__()

    look_for_long(watch, triton, begin_turns)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("metrics", [METRICS.format(0), "", "nonsense"], ids=["none", "empty", "nonsense"])
def test_a_front_end_that_has_nothing_to_do_is_alive(
    metrics: str, watch: ModelWatch, triton: Triton, front_end: FrontEnd
) -> None:
    triton.metrics = metrics
    look_for_long(watch, triton)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("name", ["execute", "replies"])
def test_a_front_end_that_comes_to_no_end_of_a_turn_hangs(
    name: str, watch: ModelWatch, front_end: FrontEnd
) -> None:
    with getattr(front_end, name):
        assert look_until_problem(watch) == f"llm hangs: one turn of {name} does not come to an end"


@pytest.mark.usefixtures("patient")
def test_a_front_end_that_no_request_reaches_hangs(
    watch: ModelWatch, triton: Triton, front_end: FrontEnd
) -> None:
    with front_end.execute:
        pass
    triton.metrics = METRICS.format(1)
    assert look_until_problem(watch) == "llm hangs: requests wait in Triton and none reaches it"


def test_a_front_end_that_does_not_say_that_it_lives_hangs(
    watch: ModelWatch, front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    front_end.socket.close()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(front_end.path))
        listener.listen()
        # Triton's own answers take more looks than there are here.
        monkeypatch.setattr(model_watch, "HUNG_LOOKS", 240)
        problem = look_until_problem(watch)
    assert problem == "llm hangs: it does not even say that it lives"


@pytest.mark.usefixtures("patient")
def test_a_front_end_without_a_process_is_dead(watch: ModelWatch, front_end: FrontEnd) -> None:
    front_end.socket.close()
    assert look_until_problem(watch).startswith("llm does not say how it is: ")


@pytest.mark.usefixtures("patient")
def test_a_model_that_triton_itself_calls_not_ready_is_dead(watch: ModelWatch, triton: Triton) -> None:
    triton.ready = 400
    assert look_until_problem(watch).startswith("tritonserver does not call llm ready: HTTP/1.1 400")


def test_a_tritonserver_that_answers_nothing_hangs(
    watch: ModelWatch, triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton.ready = None
    monkeypatch.setattr(model_watch, "HUNG_LOOKS", 1000)
    pace = threading.Event()
    # The front end needs a moment to answer, and looks alone take none.
    problem = look_until_problem(watch, lambda: bool(pace.wait(0.005)))
    assert problem == "tritonserver hangs: it does not say whether llm is ready"


@pytest.mark.usefixtures("patient")
def test_what_fails_on_our_own_side_says_nothing_of_the_server(watch: ModelWatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        for _ in range(20 * model_watch.LOOKS_BETWEEN):
            assert watch.look() == ""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
