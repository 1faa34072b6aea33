"""How `manylora serve` tells a busy front end from a hung and a dead one, asked over HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from manylora.serve import model_watch
from manylora.serve.model_watch import ModelWatch

WAIT_S = 60
NEVER = 10**9


class FrontEnd(ThreadingHTTPServer):
    """Answers requests for a token and refusals as told; None is no answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token: bytes | None = b'{"text_output":"2"}'
        self.refusal: bytes | None = b'{"error":"[INVALID_ARG] max_tokens=0"}'
        self.answered = threading.Semaphore(0)
        """Counts the answers."""
        self.is_over = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FrontEnd
    protocol_version: ClassVar[str] = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.token if asked["max_tokens"] else self.server.refusal
        if answer is None:
            self.server.is_over.wait()
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        self.server.answered.release()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def front_end() -> Iterator[FrontEnd]:
    with FrontEnd() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.is_over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def watch(front_end: FrontEnd, said: list[str]) -> Iterator[ModelWatch]:
    watch = ModelWatch(front_end.address, "llm", said.append, lambda: False)
    yield watch
    watch.close()


def look_until(watch: ModelWatch, said: list[str]) -> str:
    """Look until there is a problem or a word."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        problem = watch.look()
        if problem or said:
            return problem
    raise AssertionError(f"no word in {WAIT_S} s")


def test_a_front_end_that_only_refuses_is_busy(
    front_end: FrontEnd, watch: ModelWatch, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "HUNG_LOOKS", NEVER)
    front_end.token = None
    assert look_until(watch, said) == ""
    assert said == ["llm is busy: it has been asked for a token and has not come to it yet"]


def test_a_front_end_that_does_not_even_refuse_hangs(
    front_end: FrontEnd, watch: ModelWatch, said: list[str]
) -> None:
    front_end.token = front_end.refusal = None
    assert look_until(watch, said) == "llm hangs: it does not even refuse a request"
    assert said == []


@pytest.mark.parametrize("text", ['{"text_output":"2"}', '{"error":"[UNAVAILABLE] no engine"}'])
def test_a_front_end_that_answers_in_its_own_words_is_alive(
    text: str, front_end: FrontEnd, watch: ModelWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "BUSY_LOOKS", NEVER)
    front_end.token = text.encode()
    for _ in range(3 * model_watch.MAX_BAD_ANSWERS):
        while not front_end.answered.acquire(blocking=False):
            assert watch.look() == ""


def test_a_model_for_which_triton_answers_is_dead(
    front_end: FrontEnd, watch: ModelWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "BUSY_LOOKS", NEVER)
    front_end.token = b'{"error":"Stub process is not healthy"}'
    assert look_until(watch, []) == 'llm does not answer: {"error":"Stub process is not healthy"}'
