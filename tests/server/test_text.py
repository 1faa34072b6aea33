"""Text, not tokens: stop strings, characters of several tokens, seeds, and what a cancelled stream leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from manylora.serve.background import RunningServer
from manylora_client import Client

from bench.campaigns.harness import PROMPTS, SYNTHETIC, TRAINED, at_once, connect, status_of, wait_idle

from .wire import generate

REPEATING = "one two one two one two one two one two one"

LONG = 4000
"""Tokens that no test waits for."""


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with connect(server, "grpc") as connected:
        yield connected


@pytest.fixture(params=["http", "grpc"])
def either_client(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Client]:
    """Where what is tested depends on how the bytes travel."""
    with connect(server, request.param) as connected:
        yield connected


def test_a_stop_string_across_tokens_ends_the_text_before_it(either_client: Client):
    chunks = list(either_client.stream(PROMPTS[1], max_tokens=24))
    text = "".join(chunk.text for chunk in chunks)
    border = len("".join(chunk.text for chunk in chunks[: len(chunks) // 2]))
    stop = text[border - 2 : border + 3]
    assert len({*stop}) > 2
    for stops in (stop, ["never in there", stop]):
        whole = either_client.generate(PROMPTS[1], max_tokens=24, stop=stops)
        assert whole.text == text[: text.index(stop)]
        assert whole.finish_reason == "stop"
        assert whole.num_output_tokens == len(whole.token_ids) < 24
        parts = list(either_client.stream(PROMPTS[1], max_tokens=24, stop=stops))
        assert "".join(chunk.text for chunk in parts) == whole.text
        assert [i for chunk in parts for i in chunk.token_ids] == whole.token_ids
        assert parts[-1].finish_reason == "stop"


def test_the_earliest_stop_string_wins(client: Client):
    text = client.generate(PROMPTS[3], max_tokens=24).text
    early, late = text[4:8], text[15:20]
    assert client.generate(PROMPTS[3], max_tokens=24, stop=[late, early]).text == text[: text.index(early)]


def test_a_stop_string_that_only_begins_is_text(client: Client):
    free = client.generate(PROMPTS[0], max_tokens=12)
    stop = free.text[-3:] + " and never more"
    held = client.stream(PROMPTS[0], max_tokens=12, stop=stop).collect()
    assert (held.text, held.finish_reason) == (free.text, "length")


def test_a_stop_string_in_the_prompt_does_not_stop(client: Client):
    answer = client.generate("The sea", max_tokens=4, stop="sea", echo=True)
    assert answer.text.startswith("The sea")
    assert answer.num_output_tokens > 0


def test_characters_of_several_tokens_arrive_whole(either_client: Client):
    prompt = "🙂🎉🦜 naïve 東京 🙂🎉🦜 naïve 東京 🙂🎉🦜 naïve 東京 🙂🎉"
    whole = either_client.generate(prompt, max_tokens=40)
    assert any(ord(char) > 0xFFFF for char in whole.text), "the model was to go on with emoji"
    chunks = list(either_client.stream(prompt, max_tokens=40))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert any(chunk.token_ids and not chunk.text for chunk in chunks), "no character took several tokens"
    assert not any("\ufffd" in chunk.text for chunk in chunks[:-1])


@pytest.mark.parametrize("seed", range(3))
def test_wild_text_is_the_same_in_parts(client: Client, seed: int):
    wild: dict[str, Any] = {"temperature": 3.0, "seed": seed, "max_tokens": 40, "ignore_eos": True}
    chunks = list(client.stream("🎉", **wild))
    whole = client.generate("🎉", **wild)
    assert [i for chunk in chunks for i in chunk.token_ids] == whole.token_ids
    assert "".join(chunk.text for chunk in chunks) == whole.text


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(client: Client):
    names = ["", *SYNTHETIC[:2], *TRAINED[:1]]

    def ask(work: tuple[int, str]) -> str:
        seed, name = work
        return client.generate(
            PROMPTS[1], adapter_id=name, seed=seed, temperature=1.0, top_p=0.95, top_k=50, max_tokens=8
        ).text

    work = [(seed, name) for name in names for seed in (1, 2**63 - 1)]
    together = at_once(ask, work)
    assert [ask(item) for item in work] == together
    assert len(set(together)) > len(work) // 2


def test_without_a_seed_texts_differ(client: Client):
    texts = at_once(lambda _: client.generate(PROMPTS[1], temperature=1.0, max_tokens=12).text, range(8))
    assert len(set(texts)) > 1


def test_the_end_of_a_turn_ends_the_text(client: Client):
    answer = client.chat("Say hello.", adapter_id=TRAINED[0], max_tokens=200)
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] == 2
    assert "<|im_end|>" not in answer.text
    # The first sentence would end here, but is not let.
    longer = client.chat(
        "Say hello.", adapter_id=TRAINED[0], max_tokens=len(answer.token_ids) + 5, ignore_eos=True
    )
    assert longer.token_ids[: len(answer.token_ids)] == answer.token_ids
    assert longer.finish_reason == "length"


def test_a_chat_of_several_turns_is_understood(client: Client):
    turns = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ]
    answer = client.chat(turns, max_tokens=16, stream=True).collect()  # type: ignore[arg-type]
    assert "Ada" in answer.text
    assert answer.num_input_tokens > client.chat("What is my name?", max_tokens=1).num_input_tokens


@pytest.mark.parametrize("how", ["close", "break", "client"])
def test_leaving_a_stream_frees_its_sequence(server: RunningServer, either_client: Client, how: str):
    before = wait_idle(server).counters
    stream = either_client.stream(PROMPTS[0], adapter_id=SYNTHETIC[0], max_tokens=LONG, ignore_eos=True)
    next(stream)
    assert status_of(server).gauges["running"] == 1
    if how == "close":
        stream.close()
    elif how == "break":
        del stream
    else:
        either_client.close()
    status = wait_idle(server)
    assert status.counters["cancelled"] == before["cancelled"] + 1
    assert status.counters["generated_tokens"] - before["generated_tokens"] < LONG
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]
    assert status.check_errors == []


def test_cancelled_streams_do_not_disturb_the_others(server: RunningServer, client: Client):
    alone = client.generate(PROMPTS[2], max_tokens=12)

    def work(number: int) -> str:
        if number % 2:
            return client.stream(PROMPTS[2], max_tokens=12).collect().text
        with client.stream(
            PROMPTS[0], adapter_id=SYNTHETIC[number // 2], max_tokens=LONG, ignore_eos=True
        ) as stream:
            next(stream)
        return alone.text

    assert set(at_once(work, range(16))) == {alone.text}
    assert wait_idle(server).check_errors == []


@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 3}, {"presence_penalty": 2, "temperature": 0}, {"frequency_penalty": "2"}],
    ids=lambda penalty: next(iter(penalty)),
)
def test_a_penalty_breaks_a_repetition(server: RunningServer, penalty: dict[str, Any]):
    asked = {"text_input": REPEATING, "max_tokens": 24, "ignore_eos": True}
    plain = generate(server, **asked)["output_ids"]
    assert len(set(plain)) < 8
    assert len(set(generate(server, **asked, **penalty)["output_ids"])) > len(set(plain))
