"""HTTP against a server that says exactly what a test tells it to, at the level of bytes."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from manylora.front_end.parameters import PARAMETERS
from manylora_client import (
    Client,
    ConnectionFailed,
    Internal,
    InvalidArgument,
    ManyloraClientError,
    NotFound,
    Options,
    Timeout,
    TokenLogprob,
    Unavailable,
    connections,
)

from .blocking import BlockingClient
from .scripted_http import ANSWER, FIELDS, HOLD, ByteServer, event, events, infer_answer, plain


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
        ([event(num_input_tokens=float("inf"))], Internal),
        (["[" * 100_000], Internal),
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
        "no number",
        "deep",
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


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_a_proxys_refusal_of_a_long_request_is_read(kind: str):
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(30)

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                # Part of a body that is longer than what the two sockets hold.
                connection.recv(65536)
                connection.sendall(plain("too long", "413 Payload Too Large", "text/plain"))
                connection.shutdown(socket.SHUT_WR)
                if kind == "AsyncClient":
                    # aiohttp reads while it writes, and loses what it has read when a write fails.
                    while connection.recv(65536):
                        pass

        refused = pool.submit(refuse)
        client = (Client if kind == "Client" else BlockingClient)(
            f"127.0.0.1:{listener.getsockname()[1]}", timeout=20
        )
        with pytest.raises(InvalidArgument, match="too long"):
            client.generate("x" * 50_000_000)
        client.end() if isinstance(client, BlockingClient) else client.close()
        refused.result()


HEADERS = [("x y", "z"), ("", "z"), ("x", "a\r\nb"), ("x", "a\0"), ("é", "z"), ("x", "\u20ac")]


@pytest.mark.parametrize(("name", "value"), HEADERS, ids=repr)
@pytest.mark.parametrize("url", ["http://h", "grpc://h"])
def test_headers_that_cannot_be_sent(connect, url: str, name: str, value: str):
    with pytest.raises(InvalidArgument, match="header") as caught:
        connect(url, headers={name: value})
    assert "a\r" not in caught.value.message


@pytest.mark.parametrize("status", ["503 Service Unavailable", "404 Not Found"])
def test_an_error_page_may_end_with_its_connection(serve, connect, status: str):
    page = f"HTTP/1.0 {status}\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<p>no backend"
    server = serve([page.encode()], [page.encode()])
    with connect(server.url) as client:
        for call in (client.generate, lambda prompt: client.stream(prompt).collect()):
            with pytest.raises(NotFound if "404" in status else Unavailable, match="no backend"):
                call("x")


def test_a_body_that_comes_slowly_is_not_waited_for_past_the_timeout(connect):
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(30)

        def drip() -> bool:
            """Send a byte now and then. Whether the client leaves before a number that is far too many."""
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                connection.settimeout(0.05)
                for _ in range(600):
                    connection.sendall(b" ")
                    with contextlib.suppress(socket.timeout):
                        if connection.recv(65536) == b"":
                            return True
                return False
            return True

        has_left = pool.submit(drip)
        with connect(f"127.0.0.1:{listener.getsockname()[1]}") as client:
            with pytest.raises(Timeout):
                client.generate("x", timeout=0.5)
            assert has_left.result()


def test_a_long_answer_is_read_whole(serve, connect):
    text = "é" * 3_000_000
    server = serve([infer_answer(text_output=text), events(event(text_output=text))])
    with connect(server.url) as client:
        assert client.generate("x").text == text
        assert client.stream("x").collect().text == text


def test_log_probabilities_come_with_their_tokens(serve, connect):
    entry = {"id": 5, "text": "é", "logprob": -0.5, "top": [{"id": 7, "text": "e", "logprob": -0.25}]}
    token = TokenLogprob(
        id=5, text="é", logprob=-0.5, top=[TokenLogprob(id=7, text="e", logprob=-0.25, top=[])]
    )
    first = event(logprobs=json.dumps([entry, entry]), finish_reason="")
    last = event(output_ids=[], text_output="", logprobs="[]")
    server = serve([infer_answer(logprobs=json.dumps([entry, entry])), events(first, last)])
    with connect(server.url) as client:
        assert client.generate("x", logprobs=1).logprobs == [token, token]
        assert client.stream("x", logprobs=1).collect().logprobs == [token, token]


@pytest.mark.parametrize(
    "logprobs",
    ["{", "{}", "[1]", "[{}]", '[{"id": 1, "text": "", "logprob": null, "top": []}]', "[" * 100_000],
    ids=["no JSON", "no list", "no token", "no fields", "no number", "deep"],
)
def test_log_probabilities_that_cannot_be_read(serve, connect, logprobs: str):
    server = serve([infer_answer(logprobs=logprobs), events(event(logprobs=logprobs))])
    with connect(server.url, timeout=20) as client:
        for call in (client.generate, lambda prompt: client.stream(prompt).collect()):
            with pytest.raises(Internal):
                call("x")


def test_all_options_are_sent(serve, connect):
    options: Options = {
        "adapter_id": "a",
        "adapter_scale": 0.5,
        "max_tokens": 1,
        "min_tokens": 2,
        "stop": ["x"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "add_special_tokens": False,
        "temperature": 0.25,
        "top_p": 0.75,
        "top_k": 3,
        "min_p": 0.125,
        "seed": 4,
        "repetition_penalty": 1.5,
        "presence_penalty": 2.5,
        "frequency_penalty": 3.5,
        "logprobs": 5,
        "echo": False,
        "deadline_ms": 6,
        "request_priority": -7,
    }
    assert set(options) == set(Options.__annotations__) == set(PARAMETERS) - {"lora_name", "chat"}
    server = serve([events(event())])
    with connect(server.url) as client:
        client.stream("x", **options, unheard_of=[1]).collect()
    body = json.loads(server.requests[0][1].partition(b"\r\n\r\n")[2])
    assert body["parameters"] == {
        **options,
        "stop": '["x"]',
        "stop_token_ids": "[3]",
        "unheard_of": "[1]",
    }


def test_an_old_connection_is_not_used_again(serve, monkeypatch):
    monkeypatch.setattr(connections, "_MAX_IDLE_S", 0.0)
    server = serve([infer_answer()], [infer_answer()])
    with Client(server.url) as client:
        assert client.generate("x") == client.generate("x") == ANSWER
    assert [number for number, _ in server.requests] == [0, 1]


def test_settings_for_tls_need_https(connect):
    for url in ("http://h", "grpcs://h", "h"):
        with pytest.raises(InvalidArgument, match="TLS"):
            connect(url, tls=ssl.create_default_context())
