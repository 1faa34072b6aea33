"""How large a prompt may be is known before it is read, and long ones wait in an order that is fair."""

from __future__ import annotations

import json
import queue
import threading
from typing import Any

import pytest
from manylora.errors import InvalidArgumentError, UnavailableError
from manylora.front_end import long_prompts
from manylora.front_end.long_prompts import BYTES_PER_S, LongPrompts
from manylora.front_end.prompt import Prompt
from manylora.front_end.text import Tokenizer
from manylora.front_end.tokenising import check_size, size_of, tokenise
from manylora.messages import EngineInfo
from tokenizers import AddedToken

from .conftest import byte_tokenizer

INFO = EngineInfo(base_model="", max_model_len=16, vocab_size=300, eos_token_ids=[2])
WAIT_S = 60


def tokenizer_with(token: str) -> Tokenizer:
    """One whose longest token is this one, and whose chat template writes each content twice."""
    raw = byte_tokenizer()
    raw.add_tokens([AddedToken(token)])
    raw.chat_template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.content }}{% endfor %}"
    # Ids end below the vocabulary that the requests are for.
    return Tokenizer(raw)


WORD = "\N{EXTRATERRESTRIAL ALIEN}" * 20
TOKENIZER = tokenizer_with(WORD)


def text(content: str, **options: Any) -> Prompt:
    return Prompt(text=content.encode(), **options)


def read(prompt: Prompt) -> list[int]:
    check_size(prompt, TOKENIZER, INFO)
    return tokenise(
        prompt, TOKENIZER, EngineInfo(base_model="", max_model_len=16, vocab_size=400, eos_token_ids=[])
    )


def test_the_most_bytes_that_can_be_few_enough_tokens_are_taken() -> None:
    """Fifteen of the longest tokens, in four bytes a character and, in a chat, as twelve-byte escapes."""
    assert len(read(text(WORD * 15))) == 15
    chat = json.dumps([{"role": "", "content": WORD * 7}], indent=8)
    assert len(chat) > 12 * 7 * len(WORD)
    assert len(read(text(chat, chat=True))) == 14


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (text("x" * 1281), "1281 bytes; allowed are below max_model_len=16 tokens, .* more than 1280 bytes"),
        (text("x" * 321), "321 characters; .* more than 320 characters"),
        (text("[" * 10_000, chat=True), "10000 bytes; .* more than 7936 bytes"),
        (text('[{"role": "", "content": "' + "x" * 161 + '"}]', chat=True), "322 characters when"),
        (text('[{"role": "' + "x" * 321 + '", "content": ""}]', chat=True), "321 characters when the chat"),
        (text(json.dumps([{"role": "", "content": ""}] * 17), chat=True), "more than 16 messages"),
        (Prompt(input_ids=[0] * 16), "has 16 tokens; allowed"),
        (Prompt(text="x" * 321), "321 characters; .* more than 320 characters"),
        (Prompt(text="\ud800"), "half of a surrogate pair"),
        (Prompt(text="[" * 10_000, chat=True), "10000 characters; .* more than 7936 characters"),
        (Prompt(messages=[{"role": "", "content": "x" * 161}]), "322 characters when"),
        (Prompt(messages=[{"role": "", "content": ""}] * 17), "more than 16 messages"),
        (Prompt(), "no tokens"),
    ],
    ids=[
        *("bytes", "characters", "bytes of a chat", "rendered", "role", "messages", "ids"),
        *("str", "surrogate", "str of a chat", "rendered messages", "plain messages", "nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_few_enough_tokens_is_refused(prompt: Prompt, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        read(prompt)


def test_what_a_prompt_costs_is_its_whole_text_and_ids_cost_little() -> None:
    assert size_of(text(json.dumps([{"role": "r" * 500, "content": ""}]), chat=True)) > 500
    assert size_of(Prompt(messages=[{"role": "r" * 500, "content": "c" * 7}])) == 507
    assert size_of(Prompt(input_ids=[0] * 4096)) == 256


def test_plain_text_and_messages_are_read_as_their_wire_forms_are() -> None:
    said = [{"role": "r", "content": "c"}]
    assert read(Prompt(text="\u00e9t\u00e9")) == read(text("\u00e9t\u00e9"))
    chat = json.dumps(said)
    assert read(Prompt(messages=said)) == read(text(chat, chat=True)) == read(Prompt(text=chat, chat=True))


class Long:
    """A queue of names whose thread is held at the first job until it is let go."""

    def __init__(self) -> None:
        self.done: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.has_come, self.is_open = threading.Event(), threading.Event()
        self.prompts = LongPrompts(self._run)
        self.put("held", 1, 0.0)
        assert self.has_come.wait(WAIT_S)

    def put(self, name: str, num_bytes: int, arrived_s: float) -> None:
        self.prompts.reserve(num_bytes)
        self.prompts.put(name, num_bytes, arrived_s)

    def _run(self, name: str) -> None:
        self.has_come.set()
        assert self.is_open.wait(WAIT_S)
        self.done.put(name)

    def finish(self, count: int) -> list[str]:
        self.is_open.set()
        found = [self.done.get(timeout=WAIT_S) for _ in range(count + 1)]
        self.prompts.close()
        return found[1:]


def test_a_long_prompt_waits_for_short_ones_but_not_for_ever() -> None:
    long = Long()
    for name, seconds, arrived_s in (
        ("huge", 10, 0.0),
        ("two", 0.5, 1.0),
        ("one", 0.5, 0.5),
        ("late", 0.5, 11.0),
    ):
        long.put(name, round(seconds * BYTES_PER_S), arrived_s)
    assert long.finish(4) == ["one", "two", "huge", "late"]


def test_no_more_waits_than_may_and_one_alone_may_be_as_large_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_prompts, "MAX_LONG", 2)
    monkeypatch.setattr(long_prompts, "MAX_LONG_BYTES", 100)
    long = Long()
    monkeypatch.setattr(long_prompts, "MAX_LONG_BYTES", 59)
    long.put("a", 60, 0.0)
    monkeypatch.setattr(long_prompts, "MAX_LONG_BYTES", 100)
    with pytest.raises(UnavailableError, match=r"^1 requests with long prompts wait to be tokenised"):
        long.prompts.reserve(41)
    long.prompts.reserve(40)
    # A place that is reserved counts before it is filled.
    with pytest.raises(UnavailableError, match=r"^2 requests"):
        long.prompts.reserve(0)
    long.prompts.put("b", 40, 0.0)
    with pytest.raises(UnavailableError, match=r"^2 requests"):
        long.prompts.reserve(0)
    assert long.finish(2) == ["b", "a"]
