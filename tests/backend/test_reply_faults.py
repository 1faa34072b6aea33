"""A fault in the way of one reply, with a real engine: its request ends with INTERNAL, no other notices.

The fault finds its victim by the prompt's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from manylora.errors import CancelledRequestError, InternalError, InvalidArgumentError
from manylora.front_end import front_end as front_end_module
from manylora.front_end import protocol, tensor_door
from manylora.front_end.answer import Answer, GrowingAnswer
from manylora.front_end.prompt import Prompt
from manylora.front_end.protocol import Tensors
from manylora.front_end.text import Tokenizer
from manylora.front_end.text_stream import TextStream
from manylora.ipc import EngineConnection
from manylora.messages import Cancel, Generate, Tokens

from .faults import FaultyRecorder, Panic, make
from .front_end_setting import Recorder, Setting, running_setting, wait_until

worst_faults = pytest.mark.parametrize("fault", [MemoryError, Panic], ids=lambda fault: fault.__name__)
both = pytest.mark.parametrize("is_streaming", [False, True], ids=["unary", "stream"])

VICTIM = "a prompt of thirty-three bytes..."
LONG_ENOUGH = {"max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def setting(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with running_setting(tiny_model("llama"), tmp_path_factory.mktemp("reply_loop")) as running:
        yield running


@pytest.fixture(scope="module")
def expected(setting: Setting) -> list[Recorder]:
    """What the others are answered when nobody suffers."""
    return [setting.begin(False, f"other {n}", **LONG_ENOUGH).wait() for n in range(3)]


def in_add(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    add = GrowingAnswer.add

    def strike(self: GrowingAnswer, event: Tokens) -> None:
        if self.num_input_tokens == len(VICTIM) and self.stream.num_tokens >= 3:
            raise make(fault)
        add(self, event)

    patch.setattr(GrowingAnswer, "add", strike)


def in_encode(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    encode = protocol.encode

    def strike(answers: list[Answer]) -> Tensors:
        if answers[0].num_input_tokens == len(VICTIM):
            raise make(fault)
        return encode(answers)

    patch.setattr(protocol, "encode", strike)


def in_logprobs(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    def strike(*args: Any) -> str:
        raise make(fault)

    # Nobody but the victim asks for them.
    patch.setattr(tensor_door, "entries_json", strike)


def in_stop_search(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    def strike(self: TextStream, text: str) -> str:
        raise make(fault)

    # Run for those with a stop string, and at the end of all others, which a patched `finish` spares.
    patch.setattr(TextStream, "_match", strike)
    patch.setattr(TextStream, "finish", lambda self: self._utf8.decode(b"", final=True))


def in_decode(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    decode = protocol.decode

    def strike(given: Tensors, parameters_json: str) -> list[Prompt]:
        prompts = decode(given, parameters_json)
        if prompts[0].text == VICTIM.encode():
            raise make(fault)
        return prompts

    patch.setattr(protocol, "decode", strike)


def in_tokenising(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    encode = Tokenizer.encode

    def strike(self: Tokenizer, text: str, **options: bool) -> list[int]:
        if text == VICTIM:
            raise make(fault)
        return encode(self, text, **options)

    patch.setattr(Tokenizer, "encode", strike)


def in_new_answer(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    new_answer = front_end_module.new_answer

    def strike(sequence_id: int, prompt: Prompt, *args: Any) -> GrowingAnswer:
        if prompt.text == VICTIM.encode():
            raise make(fault)
        return new_answer(sequence_id, prompt, *args)

    patch.setattr(front_end_module, "new_answer", strike)


def in_message(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    message = Prompt.message

    def strike(self: Prompt, *args: Any) -> Generate:
        if self.text == VICTIM.encode():
            raise make(fault)
        return message(self, *args)

    patch.setattr(Prompt, "message", strike)


def in_send_to_engine(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    """After the call is known to the reply loop."""
    send = EngineConnection.send

    def strike(self: EngineConnection, message: Generate | Cancel) -> None:
        if isinstance(message, Generate) and len(message.input_ids) == len(VICTIM):
            raise make(fault)
        send(self, message)

    patch.setattr(EngineConnection, "send", strike)


def nowhere(patch: pytest.MonkeyPatch, fault: type[BaseException]) -> None:
    """For faults of the responder."""


PLACES: dict[str, Callable[[pytest.MonkeyPatch, type[BaseException]], None]] = {
    "add": in_add,
    "encode": in_encode,
    "logprobs": in_logprobs,
    "stop search": in_stop_search,
    "decode": in_decode,
    "tokenising": in_tokenising,
    "new answer": in_new_answer,
    "message": in_message,
    "send to engine": in_send_to_engine,
    "send": nowhere,
    "is_cancelled": nowhere,
}


@both
@pytest.mark.parametrize("place", PLACES)
@worst_faults
def test_a_fault_fails_its_request_and_no_other(
    setting: Setting,
    expected: list[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    is_streaming: bool,
    place: str,
    fault: type[BaseException],
) -> None:
    PLACES[place](monkeypatch, fault)
    asked = {**LONG_ENOUGH}
    if place == "is_cancelled":
        # Until it is looked at.
        asked["max_tokens"] = 200
    if place == "logprobs":
        asked["logprobs"] = 1
    if place == "stop search":
        asked["stop"] = "never in there"
    others = [setting.begin(is_streaming, f"other {n}", **LONG_ENOUGH) for n in range(2)]
    victim = setting.begin(is_streaming, VICTIM, FaultyRecorder(place, fault), **asked)
    others.append(setting.begin(is_streaming, "other 2", **LONG_ENOUGH))
    victim.wait()
    assert isinstance(victim.error, InternalError)
    assert victim.error.message.startswith("request r1: internal error")
    for other, wanted in zip(others, expected, strict=True):
        other.wait()
        assert other.error is None
        assert (other.ids, other.text) == (wanted.ids, wanted.text)
    monkeypatch.undo()
    # The next request goes through the same thread, so all replies of the earlier ones have been sent.
    assert setting.begin(is_streaming, "other 0", **LONG_ENOUGH).wait().ids == expected[0].ids
    assert [r.num_finals for r in (victim, *others)] == [1] * 4
    wait_until(lambda: setting.status().gauges["running"] == 0)


@worst_faults
def test_a_token_that_the_tokenizer_chokes_on_fails_its_request(
    setting: Setting, expected: list[Recorder], monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    free = setting.begin(True, VICTIM, **LONG_ENOUGH).wait().ids
    choke = next(i for i in free[3:] if all(i not in wanted.ids for wanted in expected))
    piece = Tokenizer.piece

    def strike(self: Tokenizer, token_id: int) -> bytes | None:
        if token_id == choke:
            raise make(fault)
        return piece(self, token_id)

    monkeypatch.setattr(Tokenizer, "piece", strike)
    others = [setting.begin(True, f"other {n}", **LONG_ENOUGH) for n in range(3)]
    victim = setting.begin(True, VICTIM, **LONG_ENOUGH).wait()
    assert isinstance(victim.error, InternalError)
    assert victim.ids == free[: len(victim.ids)]
    assert choke not in victim.ids
    for other, wanted in zip(others, expected, strict=True):
        assert other.wait().ids == wanted.ids


@worst_faults
def test_a_cancel_that_fails_costs_nobody_an_answer(
    setting: Setting, expected: list[Recorder], monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    send = EngineConnection.send

    def strike(self: EngineConnection, message: Generate | Cancel) -> None:
        if isinstance(message, Cancel):
            raise make(fault)
        send(self, message)

    monkeypatch.setattr(EngineConnection, "send", strike)
    stop = expected[0].text[5:8]
    stopped = setting.begin(False, "other 0", stop=stop, **LONG_ENOUGH).wait()
    assert (stopped.finish_reason, stopped.text) == (
        "stop",
        expected[0].text[: expected[0].text.index(stop)],
    )
    gone = Recorder()
    gone.client_has_gone = True
    asked = {**LONG_ENOUGH, "max_tokens": 200}
    assert isinstance(setting.begin(False, recorder=gone, **asked).wait().error, CancelledRequestError)
    assert setting.begin(False, "other 1", **LONG_ENOUGH).wait().ids == expected[1].ids


@worst_faults
def test_an_error_that_cannot_be_sent_is_sent_in_plain_words(
    setting: Setting, fault: type[BaseException]
) -> None:
    once = setting.begin(False, "x", FaultyRecorder("fail", fault, times=1), top_k=-1).wait()
    assert isinstance(once.error, InternalError)
    # Nothing at all can be sent to this one.
    setting.front_end(False).refuse(FaultyRecorder("fail", fault), InvalidArgumentError("no"))
    assert isinstance(setting.begin(False, "x", top_k=-1).wait().error, InvalidArgumentError)
