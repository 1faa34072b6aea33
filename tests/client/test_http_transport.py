"""HTTP against a server that says exactly what a test tells it to, at the level of bytes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from manylora_client import (
    ConnectionFailed,
    Internal,
    InvalidArgument,
    ManyloraClientError,
    NotFound,
    Timeout,
    Unavailable,
)
from scripted_http import ANSWER, FIELDS, HOLD, ByteServer, event, events, infer_answer, plain


@pytest.fixture
def serve() -> Iterator[Callable[..., ByteServer]]:
    servers: list[ByteServer] = []

    def start(*connections: list[bytes | None]) -> ByteServer:
        servers.append(ByteServer(*connections))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_whole_answer(serve, connect):
    server = serve([infer_answer()])
    with connect(server.url, headers={"Authorization": "Bearer x"}) as client:
        assert client.generate("hé", adapter_id="a", stop=["."], top_p=0.5) == ANSWER
    _, request = server.requests[0]
    assert request.startswith(b"POST /v2/models/llm/infer HTTP/1.1\r\n")
    assert b"Authorization: Bearer x\r\n" in request
    assert b'"adapter_id":"a"' in request
    assert "hé".encode() in request


def test_a_stream(serve, connect):
    first = event(text_output="é", output_ids=5, finish_reason="", num_output_tokens=1)
    server = serve([events(first, event(text_output="!", output_ids=6))])
    with connect(f"http://{server.url}/gate/") as client:
        chunks = list(client.stream(input_ids=[7, 8], adapter_id="a"))
    assert [(c.text, c.token_ids, c.finish_reason) for c in chunks] == [("é", [5], ""), ("!", [6], "stop")]
    head, _, body = server.requests[0][1].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /gate/v2/models/llm_stream/generate_stream HTTP/1.1\r\n")
    assert json.loads(body) == {"input_ids": [7, 8], "parameters": {"adapter_id": "a"}}


def test_a_chat_says_so(serve, connect):
    server = serve([events(event())])
    with connect(server.url) as client:
        assert client.chat("hi", stream=True, echo=True).collect() == ANSWER
    body = json.loads(server.requests[0][1].partition(b"\r\n\r\n")[2])
    assert body["parameters"] == {"chat": True, "echo": True}
    assert json.loads(body["text_input"]) == [{"role": "user", "content": "hi"}]


def test_one_connection_serves_many_requests(serve, connect):
    server = serve([infer_answer(), events(event()), infer_answer()])
    with connect(server.url) as client:
        assert client.generate("x") == client.stream("x").collect() == client.generate("x") == ANSWER
    assert [number for number, _ in server.requests] == [0, 0, 0]


def test_a_connection_that_the_server_closed_while_idle_is_replaced(serve, connect):
    server = serve([infer_answer()], [infer_answer()])
    with connect(server.url) as client:
        assert client.generate("x") == ANSWER
        assert server.closed_first.wait(30)
        assert client.generate("x") == ANSWER
    assert [number for number, _ in server.requests] == [0, 1]


def test_a_failed_request_leaves_its_connection_usable(serve, connect):
    refusal = plain('{"error":"[NOT_FOUND] adapter \'x\'"}', "404 Not Found")
    server = serve(
        [refusal, events('{"error":"[NOT_FOUND] adapter \'x\'"}', status="400 Bad Request")], [infer_answer()]
    )
    with connect(server.url) as client:
        with pytest.raises(NotFound, match=r"^adapter 'x'$"):
            client.generate("x")
        with pytest.raises(NotFound, match=r"^adapter 'x'$"):
            client.stream("x").collect()
        # An error event ends the stream at once, so its connection is not read to the end and not kept.
        assert client.generate("x") == ANSWER


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (plain("<html>bad gateway</html>", "502 Bad Gateway", "text/html"), Unavailable),
        (plain("", "500 Internal Server Error"), Internal),
        (plain('{"error":"unexpected shape"}', "400 Bad Request"), InvalidArgument),
        (plain("[]", "400 Bad Request"), InvalidArgument),
        (plain("{}"), Internal),
        (plain("hello", kind="text/plain"), Internal),
        (b"SSH-2.0-OpenSSH_9.6\r\n", ConnectionFailed),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", ConnectionFailed),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", ConnectionFailed),
        (b"", ConnectionFailed),
    ],
    ids=[
        "proxy",
        "no message",
        "no code",
        "no object",
        "no outputs",
        "no JSON",
        "no HTTP",
        "short body",
        "bad chunk",
        "nothing",
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["infer", "generate_stream"])
def test_bad_answers(serve, answer: bytes, expected: type[ManyloraClientError], streaming: bool, connect):
    server = serve([answer])
    with connect(server.url, timeout=20) as client, pytest.raises(ManyloraClientError) as caught:
        client.stream("x").collect() if streaming else client.generate("x")
    if not streaming or answer[9:12] != b"200":
        assert type(caught.value) is expected
    else:
        # Of a 200 that is no event stream, the kind of answer is wrong before its length or chunks are.
        assert type(caught.value) in (expected, Internal)


@pytest.mark.parametrize(
    ("bodies", "expected"),
    [
        (["not JSON"], Internal),
        (["[1]"], Internal),
        ([event(text_output=None)], Internal),
        ([event(output_ids="x")], Internal),
        ([event(num_input_tokens=[])], Internal),
        ([json.dumps({"text_output": "x"})], Internal),
        ([event(finish_reason="")], ConnectionFailed),
        ([], ConnectionFailed),
        ([event(), event()], Internal),
        ([event(finish_reason=""), '{"error":"[UNAVAILABLE] the engine died"}'], Unavailable),
        (['{"error":"Stub process \'llm_stream_0_0\' is not healthy."}'], Unavailable),
        (['{"error":"strange"}'], Internal),
    ],
    ids=[
        "no JSON",
        "no object",
        "null output",
        "wrong type",
        "empty output",
        "missing output",
        "no last reply",
        "no reply",
        "reply after the last",
        "error after a reply",
        "dead front end",
        "error without code",
    ],
)
def test_bad_events(serve, bodies: list[str], expected: type[ManyloraClientError], connect):
    server = serve([events(*bodies)])
    with connect(server.url, timeout=20) as client:
        stream = client.stream("x")
        with pytest.raises(expected) as caught:
            stream.collect()
        assert type(caught.value) is expected
        assert list(stream) == []


def test_a_stream_cut_anywhere_is_a_broken_connection(serve, connect):
    whole = events(event(finish_reason=""), event())
    # All replies have come once the last chunk's "0" is there, whatever becomes of the line ends after it.
    for end in range(len(whole) - len(b"\r\n\r\n")):
        server = serve([whole[:end]])
        with connect(server.url, timeout=20) as client, pytest.raises(ConnectionFailed):
            client.stream("x").collect()


def test_an_answer_cut_anywhere_is_a_broken_connection(serve, connect):
    whole = infer_answer()
    for end in range(0, len(whole), 7):
        server = serve([whole[:end]])
        with connect(server.url, timeout=20) as client, pytest.raises(ConnectionFailed):
            client.generate("x")


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "logprobs"])
def test_a_missing_output_is_named(serve, name: str, connect):
    outputs = {k: v for k, v in FIELDS.items() if k != name}
    server = serve([events(json.dumps(outputs))])
    with connect(server.url, timeout=20) as client, pytest.raises(Internal, match=name):
        client.stream("x").collect()


def test_a_silent_server_is_a_timeout(serve, connect):
    server = serve([HOLD], [HOLD], [HOLD])
    with connect(server.url, timeout=0.2) as client:
        with pytest.raises(Timeout):
            client.generate("x")
        with pytest.raises(Timeout):
            client.stream("x").collect()
        assert not client.is_ready(timeout=0.2)


def test_the_timeout_bounds_the_whole_stream(serve, connect):
    unfinished = events(event(finish_reason=""))[: -len(b"0\r\n\r\n")]
    server = serve([unfinished, HOLD])
    # The second request never comes: the connection stays open and silent after the first event.
    with connect(server.url) as client, client.stream("x", timeout=3) as stream:
        assert next(stream).text == "é!"
        with pytest.raises(Timeout):
            next(stream)
        assert list(stream) == []


@pytest.mark.parametrize("how", ["close", "with", "drop", "client"])
def test_leaving_a_stream_early_closes_its_connection(serve, how: str, connect):
    unfinished = events(event(finish_reason=""))[: -len(b"0\r\n\r\n")]
    server = serve([unfinished, HOLD])
    with connect(server.url, timeout=30) as client:
        stream = client.stream("x")
        next(stream)
        if how == "close":
            stream.close()
        elif how == "with":
            with stream:
                pass
        elif how == "drop":
            del stream
        else:
            client.close()
        assert server.client_closed.wait(30)


def test_another_thread_can_close_a_stream_that_waits(serve, connect):
    unfinished = events(event(finish_reason=""))[: -len(b"0\r\n\r\n")]
    server = serve([unfinished, HOLD])
    received: list[str] = []
    first = threading.Event()
    with connect(server.url, timeout=30) as client:
        stream = client.stream("x")

        def read() -> None:
            for chunk in stream:
                received.append(chunk.text)
                first.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert first.wait(30)
        stream.close()
        reader.join(30)
        assert not reader.is_alive()
    assert received == ["é!"]


def test_readiness_asks_the_server_and_both_models(serve, connect):
    ok, bad = plain("", "200 OK"), plain("", "400 Bad Request")
    server = serve([ok, ok, ok, ok, ok, bad, bad])
    with connect(server.url) as client:
        assert client.is_ready()
        assert not client.is_ready()
        assert not client.is_ready()
    paths = [request.split()[1] for _, request in server.requests]
    ready = [b"/v2/health/ready", b"/v2/models/llm/ready", b"/v2/models/llm_stream/ready"]
    assert paths == [*ready, *ready, ready[0]]


def test_no_server_is_a_failed_connection(connect):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"127.0.0.1:{listener.getsockname()[1]}"
    with connect(url) as client:
        assert not client.is_ready()
        with pytest.raises(ConnectionFailed, match=url):
            client.generate("x")
        with pytest.raises(ConnectionFailed, match=url):
            client.stream("x").collect()


def test_a_closed_client_says_so(serve, connect):
    client = connect("localhost:1")
    client.close()
    client.close()
    assert not client.is_ready()
    for call in (client.generate, client.stream, client.chat):
        with pytest.raises(ConnectionFailed, match="closed"):
            call("x")


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_above_zero(timeout: float, connect):
    with pytest.raises(InvalidArgument, match="timeout"):
        connect("localhost", timeout=timeout)
    with connect("localhost") as client, pytest.raises(InvalidArgument, match="timeout"):
        client.generate("x", timeout=timeout)


def test_a_header_that_cannot_be_sent(serve, connect):
    server = serve([HOLD])
    with (
        connect(server.url, headers={"X": "a\r\nb"}) as client,
        pytest.raises(InvalidArgument, match="cannot be sent"),
    ):
        client.generate("x")
