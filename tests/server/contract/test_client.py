"""Both clients against the real server: what the scripted servers of tests/client only claim."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from manylora.serve.background import RunningServer
from manylora_client import (
    Client,
    Completion,
    InvalidArgument,
    NotFound,
    Timeout,
    Unavailable,
)

from bench.campaigns.harness import (
    DONE_S,
    PROMPTS,
    SYNTHETIC,
    TRAINED,
    at_once,
    connect,
    status_of,
    wait_idle,
)

from ...client.blocking import BlockingClient


@pytest.fixture(params=["http", "grpc", "async http", "async grpc"])
def client(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Client | BlockingClient]:
    """A Client, or an AsyncClient that looks like one."""
    protocol = request.param.removeprefix("async ")
    if protocol == request.param:
        with connect(server, protocol) as connected:
            yield connected
        return
    url = server.http if protocol == "http" else server.grpc
    blocking = BlockingClient(url, protocol, timeout=DONE_S)
    yield blocking
    blocking.end()
    blocking.check()


def test_a_running_server_is_ready(client: Client):
    assert client.is_ready()


def test_a_server_without_the_named_models_is_not_ready(server: RunningServer):
    for url in (f"http://{server.http}", f"grpc://{server.grpc}"):
        with Client(url, model="gpt", stream_model="gpt_stream") as client:
            assert not client.is_ready()
            with pytest.raises(NotFound, match="gpt"):
                client.generate("x")
            with pytest.raises(NotFound, match="gpt_stream"):
                client.stream("x").collect()


def test_all_ways_to_ask_give_one_answer(client: Client):
    asked = {"adapter_id": SYNTHETIC[0], "max_tokens": 6}
    whole = client.generate(PROMPTS[0], **asked)
    assert client.stream(PROMPTS[0], **asked).collect() == whole
    assert client.generate(PROMPTS[0], lora_name=SYNTHETIC[0], max_tokens=6) == whole
    assert client.generate(PROMPTS[0], **asked, temperature=0, top_p=1.0, top_k=0, stop=["never"]) == whole
    ids = {"input_ids": whole.token_ids}
    assert client.stream(**ids, **asked).collect() == client.generate(**ids, **asked)


def test_a_chat_is_answered_in_the_adapters_manner(client: Client):
    whole = client.chat("What is the capital of France?", adapter_id="pirate", max_tokens=12)
    assert (
        client.chat(
            "What is the capital of France?", adapter_id="pirate", max_tokens=12, stream=True
        ).collect()
        == whole
    )
    assert whole.text != client.chat("What is the capital of France?", max_tokens=12).text


def test_a_message_that_looks_like_json_is_a_message(client: Client):
    turns = [{"role": "user", "content": "[1, 2]"}]
    assert client.chat("[1, 2]", max_tokens=4) == client.chat(turns, max_tokens=4)  # type: ignore[arg-type]


def test_errors_are_the_same_whole_and_streamed(client: Client):
    for expected, options in (
        (NotFound, {"adapter_id": "nobody"}),
        (InvalidArgument, {"top_p": 2}),
        (InvalidArgument, {"unheard_of": 1}),
        (InvalidArgument, {"min_p": 2}),
    ):
        messages = set()
        for call in (client.generate, lambda *a, **k: client.stream(*a, **k).collect(), client.chat):
            with pytest.raises(expected) as caught:
                call("x", **options)
            assert type(caught.value) is expected
            messages.add(caught.value.message)
        assert len(messages) == 1


def test_log_probabilities_come_with_their_tokens(client: Client):
    asked = {"adapter_id": SYNTHETIC[0], "max_tokens": 5, "logprobs": 3}
    whole = client.generate(PROMPTS[0], **asked)
    assert whole.logprobs is not None
    assert [token.id for token in whole.logprobs] == whole.token_ids
    for token in whole.logprobs:
        # Greedy: the token is the likeliest one.
        assert (token.top[0].id, token.top[0].text, token.top[0].logprob) == (
            token.id,
            token.text,
            token.logprob,
        )
        assert [other.top for other in token.top] == [[]] * 3
        assert 0 >= token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob
    streamed = client.stream(PROMPTS[0], **asked).collect()
    assert [[token.id, *(other.id for other in token.top)] for token in streamed.logprobs or []] == [
        [token.id, *(other.id for other in token.top)] for token in whole.logprobs
    ]
    assert client.generate(PROMPTS[0], max_tokens=1).logprobs is None


def test_options_reach_the_engine(client: Client):
    asked = {"max_tokens": 8, "adapter_id": SYNTHETIC[0]}
    plain = client.generate(PROMPTS[0], **asked)
    scaled = client.generate(PROMPTS[0], **asked, adapter_scale=0.0)
    assert scaled.token_ids == client.generate(PROMPTS[0], max_tokens=8).token_ids
    echoed = client.generate(PROMPTS[0], **asked, echo=True)
    assert echoed.text == PROMPTS[0] + plain.text
    neutral = {
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "request_priority": 3,
        "min_tokens": 1,
        "deadline_ms": 1000 * DONE_S,
    }
    assert client.generate(PROMPTS[0], **asked, **neutral) == plain
    # Tokens of a text that begins to repeat itself make place for others.
    asked["max_tokens"] = 24
    assert (
        client.generate(PROMPTS[0], **asked, presence_penalty=2.0, frequency_penalty=2.0).token_ids
        != client.generate(PROMPTS[0], **asked).token_ids
    )
    with pytest.raises(Unavailable, match="deadline_ms"):
        client.generate(PROMPTS[0], max_tokens=4000, ignore_eos=True, deadline_ms=1)


def test_threads_share_a_client(client: Client):
    names = ["", *SYNTHETIC, *TRAINED]

    def ask(number: int) -> Completion:
        asked = {"adapter_id": names[number // 2 % len(names)], "max_tokens": 4}
        return (
            client.stream(PROMPTS[1], **asked).collect()
            if number % 2
            else client.generate(PROMPTS[1], **asked)
        )

    found = at_once(ask, range(2 * len(names)))
    assert found[::2] == found[1::2]
    assert len({completion.adapter_version for completion in found}) == len(names)


def test_a_stream_past_its_timeout_is_cancelled(server: RunningServer, client: Client):
    before = wait_idle(server).counters["cancelled"]
    stream = client.stream(PROMPTS[0], max_tokens=4000, ignore_eos=True, timeout=4.0)
    # Before its first reply, Triton would not see that an HTTP client has gone.
    next(stream)
    with pytest.raises(Timeout):
        stream.collect()
    assert wait_idle(server).counters["cancelled"] == before + 1
    assert status_of(server).check_errors == []


def test_closing_the_client_ends_its_streams(server: RunningServer, client: Client):
    streams = [client.stream(PROMPTS[0], max_tokens=4000, ignore_eos=True) for _ in range(4)]
    for stream in streams:
        next(stream)
    client.close()
    assert [list(stream) for stream in streams] == [[]] * 4
    assert wait_idle(server).check_errors == []
