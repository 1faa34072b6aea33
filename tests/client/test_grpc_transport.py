"""gRPC against a server that speaks Triton's service and says what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from manylora_client import (
    Cancelled,
    ConnectionFailed,
    Internal,
    InvalidArgument,
    ManyloraClientError,
    NotFound,
    Timeout,
    TokenLogprob,
    Unavailable,
)

from .scripted_grpc import ANSWER, HOLD, Relay, ScriptedTriton, failure, only_flag, reply, response, running

LOGPROBS = [
    {"id": 5, "text": "é", "logprob": -0.5, "top": [{"id": 5, "text": "é", "logprob": -0.5}]},
    {"id": 6, "text": "!", "logprob": -1, "top": []},
]
TOKENS = [
    TokenLogprob(id=5, text="é", logprob=-0.5, top=[TokenLogprob(id=5, text="é", logprob=-0.5)]),
    TokenLogprob(id=6, text="!", logprob=-1.0),
]


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[ScriptedTriton, str]]]:
    with contextlib.ExitStack() as stack:

        def start(*script: Any) -> tuple[ScriptedTriton, str]:
            triton = ScriptedTriton(list(script))
            _, url = stack.enter_context(running(triton))
            return triton, url

        yield start


def test_a_whole_answer(serve, connect):
    triton, url = serve(response())
    with connect(url, headers={"Authorization": "Bearer x"}) as client:
        assert client.generate("hé", adapter_id="a", top_k=3, top_p=0.5, echo=True, stop=["."]) == ANSWER
        assert client.generate(input_ids=[7, 8]) == ANSWER
    text, ids = triton.requests
    assert (text.model_name, text.inputs[0].name, list(text.inputs[0].shape)) == ("llm", "text_input", [1, 1])
    assert text.raw_input_contents[0] == b"\x03\x00\x00\x00" + "hé".encode()
    assert text.parameters["adapter_id"].string_param == "a"
    assert text.parameters["top_k"].int64_param == 3
    assert text.parameters["top_p"].double_param == 0.5
    assert text.parameters["echo"].bool_param is True
    assert text.parameters["stop"].string_param == '["."]'
    assert len(text.parameters) == 5
    assert (ids.inputs[0].name, list(ids.inputs[0].shape)) == ("input_ids", [1, 2])
    assert ids.raw_input_contents[0] == struct.pack("<2i", 7, 8)
    assert triton.metadata["authorization"] == "Bearer x"


@pytest.mark.parametrize(
    "ending",
    [[response("!", (6,), final=True)], [response("!", (6,), final=False), only_flag()]],
    ids=["flag on the last data", "flag alone"],
)
def test_a_stream(serve, ending: list[Any], connect):
    triton, url = serve(reply(response("é", (5,), "", final=False)), *map(reply, ending))
    with connect(url) as client:
        assert client.stream("x").collect() == ANSWER
    assert triton.requests[0].model_name == "llm_stream"
    assert triton.requests[0].parameters["triton_enable_empty_final_response"].bool_param is True


def test_a_chunk_may_hold_no_ids(serve, connect):
    first, last = response("é", (5, 6), "", final=False), response("!", (), final=True)
    _, url = serve(reply(first), reply(last))
    with connect(url) as client:
        assert [chunk.token_ids for chunk in client.stream("x")] == [[5, 6], []]


def test_log_probabilities_come_with_their_tokens(serve, connect):
    first = response("é", (5,), "", final=False, logprobs=json.dumps(LOGPROBS[:1]))
    last = response("!", (6,), final=True, logprobs=json.dumps(LOGPROBS[1:]))
    _, url = serve(reply(first), reply(last))
    with connect(url) as client:
        chunks = list(client.stream("x", logprobs=2))
    assert [[token.id for token in chunk.logprobs] for chunk in chunks] == [[5], [6]]
    _, url = serve(response(logprobs=json.dumps(LOGPROBS)))
    with connect(url) as client:
        whole = client.generate("x", logprobs=2)
    assert whole.logprobs == [token for chunk in chunks for token in chunk.logprobs] == TOKENS


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ([reply(response(finish="", final=False))], ConnectionFailed),
        ([reply(response(final=False))], ConnectionFailed),
        ([reply(response(finish="", final=True))], ConnectionFailed),
        ([], ConnectionFailed),
        ([reply(response(final=False)), reply(response(final=True))], Internal),
        ([reply(response(leave_out="output_ids", final=True))], Internal),
        ([failure("[NOT_FOUND] adapter 'x'")], NotFound),
        ([reply(response(finish="", final=False)), failure("[UNAVAILABLE] the engine died")], Unavailable),
        ([failure("Stub process 'llm_stream_0_0' is not healthy.")], Unavailable),
        ([failure("strange")], Internal),
        ([(grpc.StatusCode.UNAVAILABLE, "Socket closed")], ConnectionFailed),
        ([(grpc.StatusCode.CANCELLED, "by a proxy")], Cancelled),
    ],
    ids=[
        "no final reply",
        "no final flag",
        "no finish reason",
        "no reply",
        "reply after the last",
        "missing output",
        "error",
        "error after a reply",
        "dead front end",
        "error without code",
        "broken",
        "cancelled elsewhere",
    ],
)
def test_bad_streams(serve, script: list[Any], expected: type[ManyloraClientError], connect):
    _, url = serve(*script)
    with connect(url, timeout=20) as client:
        stream = client.stream("x")
        with pytest.raises(ManyloraClientError) as caught:
            stream.collect()
        assert type(caught.value) is expected
        assert list(stream) == []


@pytest.mark.parametrize("num_chars", [1, 5_000_000], ids=["short prompt", "long prompt"])
def test_a_refusal_before_the_request_is_read_keeps_its_status(serve, connect, monkeypatch, num_chars: int):
    def refuse(self, requests: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who asks?")

    monkeypatch.setattr(ScriptedTriton, "ModelStreamInfer", refuse)
    _, url = serve()
    with connect(url, timeout=30) as client:
        for _ in range(20):
            with pytest.raises(InvalidArgument, match="who asks"):
                client.stream("x" * num_chars).collect()


def test_replies_that_come_at_once_are_all_read(serve, connect):
    num = 300
    script = [reply(response("a", (i,), "", final=False)) for i in range(num)]
    _, url = serve(*script, reply(response("b", (num,), final=True)))
    with connect(url, timeout=60) as client:
        for _ in range(3):
            assert client.stream("x").collect().token_ids == list(range(num + 1))


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((grpc.StatusCode.NOT_FOUND, "[NOT_FOUND] adapter 'x'"), NotFound),
        ((grpc.StatusCode.INTERNAL, "[UNAVAILABLE] queue full"), Unavailable),
        ((grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape"), InvalidArgument),
        (response(leave_out="finish_reason"), Internal),
        (only_flag(), Internal),
        (response(logprobs="[{}]"), Internal),
    ],
    ids=["code", "the prefix wins", "no prefix", "missing output", "no outputs", "bad logprobs"],
)
def test_bad_answers(serve, item: Any, expected: type[ManyloraClientError], connect):
    _, url = serve(item)
    with connect(url, timeout=20) as client, pytest.raises(ManyloraClientError) as caught:
        client.generate("x")
    assert type(caught.value) is expected


def test_bytes_that_are_no_tensor(serve, connect):
    message = response(final=True)
    message.raw_output_contents[0] = b"\xff\xff\xff\xff"
    _, url = serve(reply(message))
    with connect(url, timeout=20) as client, pytest.raises(Internal, match="cannot be read"):
        client.stream("x").collect()


@pytest.mark.parametrize("streaming", [False, True], ids=["infer", "stream"])
def test_a_server_that_dies_is_a_failed_connection(serve, connect, streaming: bool):
    triton, url = serve(reply(response(finish="", final=False)) if streaming else HOLD, HOLD)
    relay = Relay(url)
    with connect(relay.url, timeout=30) as client, ThreadPoolExecutor(1) as pool:
        stream = client.stream("x") if streaming else None
        if stream is not None:
            next(stream)
        rest = pool.submit(stream.collect if stream is not None else lambda: client.generate("x"))
        assert triton.arrived.wait(30)
        relay.cut()
        with pytest.raises(ConnectionFailed):
            rest.result()


def test_a_silent_server_is_a_timeout(serve, connect):
    _, url = serve(HOLD)
    with connect(url, timeout=0.3) as client:
        with pytest.raises(Timeout):
            client.generate("x")
        with pytest.raises(Timeout):
            client.stream("x").collect()


@pytest.mark.parametrize("how", ["close", "with", "drop", "client"])
def test_leaving_a_stream_early_cancels_it(serve, how: str, connect):
    triton, url = serve(reply(response(finish="", final=False)), HOLD)
    with connect(url, timeout=30) as client:
        stream = client.stream("x")
        next(stream)
        if how == "close":
            stream.close()
            assert list(stream) == []
        elif how == "with":
            with stream:
                pass
        elif how == "drop":
            del stream
        else:
            client.close()
        assert triton.cancelled.wait(30)


def test_another_thread_can_close_a_stream_that_waits(serve, connect):
    _, url = serve(reply(response("é", finish="", final=False)), HOLD)
    received: list[str] = []
    first = threading.Event()
    with connect(url, timeout=30) as client:
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
    assert received == ["é"]


def test_a_closed_stream_cannot_be_collected(serve, connect):
    _, url = serve(reply(response(finish="", final=False)), HOLD)
    with connect(url, timeout=30) as client, client.stream("x") as stream:
        next(stream)
        stream.close()
        with pytest.raises(Cancelled):
            stream.collect()


def test_a_server_that_refuses_the_question_is_not_ready(serve, connect, monkeypatch):
    def refuse(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who asks?")

    monkeypatch.setattr(ScriptedTriton, "ServerReady", refuse)
    _, url = serve()
    with connect(url) as client:
        assert not client.is_ready()


def test_readiness_asks_both_models(serve, connect):
    triton, url = serve()
    with connect(url) as client:
        assert client.is_ready()
        triton.ready = {"llm"}
        assert not client.is_ready()
    assert not client.is_ready()


def test_no_server_is_a_failed_connection(serve, connect):
    with connect("grpc://127.0.0.1:1") as client:
        assert not client.is_ready()
        with pytest.raises(ConnectionFailed):
            client.generate("x")
        with pytest.raises(ConnectionFailed):
            client.stream("x").collect()
