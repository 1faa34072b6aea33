"""A front end on a real engine (a tiny random model) behind a real socket, with a responder that records."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manylora.engine.runner import Runner
from manylora.errors import (
    CancelledRequestError,
    InternalError,
    InvalidArgumentError,
    ManyloraError,
    NotFoundError,
    UnavailableError,
)
from manylora.front_end import tensor_door
from manylora.front_end.front_end import FrontEnd

from .front_end_setting import WAIT_S, Recorder, Setting, running_setting, submit, tensors, wait_until


@pytest.fixture(scope="module")
def module_setting(
    tiny_model: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("front_end")
    with running_setting(tiny_model("llama"), directory) as setting:
        make_adapter(tiny_model("llama"), directory / "adapters" / "a", 0, r=8, target_modules=["q_proj"])
        yield setting


@pytest.fixture
def setting(module_setting: Setting) -> Setting:
    return module_setting


both = pytest.mark.parametrize("is_streaming", [False, True], ids=["unary", "stream"])


def test_one_reply_and_a_stream_say_the_same(setting: Setting) -> None:
    whole = setting.begin(False, max_tokens=24).wait()
    stream = setting.begin(True, max_tokens=24).wait()
    assert len(whole.replies) == 1
    assert len(stream.replies) > 1
    assert (stream.text, stream.ids, stream.finish_reason) == (whole.text, whole.ids, whole.finish_reason)
    assert whole.text == setting.tokenizer.decode(whole.ids)
    assert [reply["finish_reason"][0, 0] for reply in stream.replies[:-1]] == [b""] * (
        len(stream.replies) - 1
    )
    totals = [int(reply["num_output_tokens"][0, 0]) for reply in stream.replies]
    assert totals == list(np.cumsum([reply["output_ids"].shape[1] for reply in stream.replies]))
    assert {int(reply["num_input_tokens"][0, 0]) for reply in stream.replies} == {2}


@both
def test_length_ends_a_sequence(setting: Setting, is_streaming: bool) -> None:
    answer = setting.begin(is_streaming, max_tokens=7, ignore_eos=True).wait()
    assert (answer.finish_reason, len(answer.ids)) == ("length", 7)


@both
def test_a_stop_string_cuts_the_text_keeps_the_ids_and_frees_the_sequence(
    setting: Setting, is_streaming: bool
) -> None:
    free = setting.begin(is_streaming, max_tokens=40, ignore_eos=True).wait()
    text = free.text
    stop = text[5:8]
    cut = text.index(stop)
    answer = setting.begin(is_streaming, max_tokens=200, ignore_eos=True, stop=stop).wait()
    assert answer.error is None
    assert (answer.text, answer.finish_reason) == (text[:cut], "stop")
    assert answer.ids == free.ids[: len(answer.ids)]
    assert stop in setting.tokenizer.decode(answer.ids)
    assert stop not in setting.tokenizer.decode(answer.ids[:-1])
    # Freed in the engine: nobody waits for the other 190 tokens.
    wait_until(lambda: setting.status().gauges["running"] == 0)


@both
def test_echo_puts_the_prompt_in_front_once(setting: Setting, is_streaming: bool) -> None:
    plain = setting.begin(is_streaming, "été", max_tokens=5).wait()
    echoed = setting.begin(is_streaming, "été", max_tokens=5, echo=True).wait()
    assert echoed.text == "été" + plain.text
    assert echoed.ids == plain.ids
    ids = setting.tokenizer.encode("été")
    assert setting.begin(is_streaming, ids, max_tokens=5, echo="true").wait().text == echoed.text


def test_a_batch_is_answered_in_one_reply_with_padded_ids(setting: Setting) -> None:
    prompts = ["one", "number two"]
    batch = setting.begin(
        False,
        {**tensors(prompts), "sampling_parameters": tensors(['{"max_tokens": 3}', "{}"])["text_input"]},
        ignore_eos=True,
    ).wait()
    (reply,) = batch.replies
    alone = [
        setting.begin(False, p, ignore_eos=True, max_tokens=n).wait()
        for p, n in zip(prompts, (3, 128), strict=True)
    ]
    assert reply["output_ids"].shape == (2, 128)
    assert reply["output_ids"][0, :3].tolist() == alone[0].ids
    assert set(reply["output_ids"][0, 3:].tolist()) == {-1}
    assert reply["output_ids"][1].tolist() == alone[1].ids
    assert reply["num_output_tokens"][:, 0].tolist() == [3, 128]


def test_one_failing_sequence_fails_its_request_and_frees_the_others(setting: Setting) -> None:
    rows = tensors(["{}", '{"adapter_id": "absent"}'])["text_input"]
    answer = setting.begin(False, {**tensors(["a", "b"]), "sampling_parameters": rows}, max_tokens=200).wait()
    assert isinstance(answer.error, NotFoundError)
    wait_until(lambda: setting.status().gauges["running"] == 0)


def test_a_stream_takes_one_sequence(setting: Setting) -> None:
    answer = setting.begin(True, ["a", "b"]).wait()
    assert isinstance(answer.error, InvalidArgumentError)
    assert "a batch of 2" in answer.error.message


REFUSED: dict[str, tuple[Any, dict[str, Any], type[ManyloraError], str]] = {
    "unknown adapter": ("hi", {"adapter_id": "absent"}, NotFoundError, "absent"),
    "bad adapter name": ("hi", {"adapter_id": "../x"}, InvalidArgumentError, "../x"),
    "bad parameter": ("hi", {"top_k": -1}, InvalidArgumentError, "top_k"),
    "no ids": ("", {}, InvalidArgumentError, "no tokens"),
    "too long": ([5] * 256, {}, InvalidArgumentError, "256 tokens"),
    "more than tokens": ("x" * 2817, {}, InvalidArgumentError, "2817 characters"),
    "far too long": ("x" * 100_000, {}, InvalidArgumentError, "100000 bytes"),
    "far too many ids": (
        {"input_ids": np.zeros((1, 10**6), np.int32)},
        {},
        InvalidArgumentError,
        "1000000 tokens",
    ),
    "no UTF-8": ({"text_input": np.array([[b"\xff"]], object)}, {}, InvalidArgumentError, "not UTF-8"),
    "a stop token outside": ("hi", {"stop_token_ids": [300]}, InvalidArgumentError, "got 300"),
    "parameters without end": ("hi", {"stop": "x" * 10**6}, InvalidArgumentError, "allowed are 65536"),
    "outside the vocabulary": ([5, 300], {}, InvalidArgumentError, "got 300"),
    "no template": ("hi", {"chat": True}, ManyloraError, "no chat template"),
}


@both
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_fails_alone(setting: Setting, is_streaming: bool, case: str) -> None:
    prompt, parameters, kind, words = REFUSED[case]
    beside = setting.begin(is_streaming, max_tokens=4)
    answer = setting.begin(is_streaming, prompt, **parameters).wait()
    assert isinstance(answer.error, kind)
    assert words in answer.error.message
    assert answer.replies == []
    assert beside.wait().error is None


@both
def test_a_cancelled_request_ends_with_cancelled_and_frees_its_sequence(
    setting: Setting, is_streaming: bool
) -> None:
    answer = Recorder()
    answer.client_has_gone = True
    setting.begin(is_streaming, recorder=answer, max_tokens=250, ignore_eos=True).wait()
    assert isinstance(answer.error, CancelledRequestError)
    wait_until(lambda: setting.status().gauges["running"] == 0)


@both
def test_a_fault_while_sending_ends_the_request_with_internal_and_its_id(
    setting: Setting, is_streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    answer = setting.begin(is_streaming, recorder=Recorder(fail_sends=1), max_tokens=20).wait()
    assert isinstance(answer.error, InternalError)
    assert "request r1" in answer.error.message
    assert "a fault of the sender" in caplog.text
    assert setting.begin(is_streaming, max_tokens=2).wait().error is None


def test_a_fault_while_reading_ends_the_request_with_internal(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    tensor_door.submit(setting.front_end(False), recorder, tensors("hi"), "{not json", time.monotonic())
    assert isinstance(recorder.wait().error, InternalError)
    assert "JSONDecodeError" in caplog.text


def test_many_requests_at_once_all_end_with_their_own_answer(setting: Setting) -> None:
    alone = {n: setting.begin(False, f"p{n}", max_tokens=12, ignore_eos=True).wait().ids for n in range(4)}
    begun = [
        (n % 4, setting.begin(bool(n % 2), f"p{n % 4}", max_tokens=12, ignore_eos=True)) for n in range(40)
    ]
    for n, recorder in begun:
        assert recorder.wait().ids == alone[n]
        assert recorder.num_finals == 1


@both
def test_the_end_of_the_engine_ends_requests_and_the_next_engine_serves(
    setting: Setting, is_streaming: bool
) -> None:
    expected = setting.begin(is_streaming, max_tokens=5).wait().ids
    answer = setting.begin(is_streaming, max_tokens=253, ignore_eos=True)
    if is_streaming:
        assert answer.first.wait(WAIT_S)
    setting.stop_engine()
    front_end = setting.front_ends[is_streaming]
    answer.wait()
    assert isinstance(answer.error, UnavailableError) or answer.finish_reason == "length"
    refused = Recorder()
    wait_until(lambda: not front_end.is_ready)
    submit(front_end, refused)
    assert isinstance(refused.wait().error, UnavailableError)
    setting.start_engine()
    assert setting.begin(is_streaming, max_tokens=5).wait().ids == expected


def test_closing_fails_what_is_in_flight_and_frees_it(setting: Setting) -> None:
    front_end = FrontEnd(setting.path)
    assert front_end.wait_ready(WAIT_S)
    answers = [Recorder(is_streaming=False) for _ in range(3)]
    for answer in answers:
        submit(front_end, answer, max_tokens=250, ignore_eos=True)
    front_end.close()
    for answer in answers:
        assert isinstance(answer.wait().error, UnavailableError)
        assert answer.num_finals == 1
    wait_until(lambda: setting.status().gauges["running"] == 0)


def row_parameters(*rows: dict[str, Any]) -> Any:
    return tensors([json.dumps(row) for row in rows])["text_input"]


def logprobs_of(answer: Recorder, row: int = 0) -> list[dict[str, Any]]:
    """Those of all replies; each reply's must be about its own ids."""
    entries: list[dict[str, Any]] = []
    for reply in answer.replies:
        found = json.loads(reply["logprobs"][row, 0].decode())
        ids = [i for i in reply["output_ids"][row].tolist() if i >= 0]
        assert [entry["id"] for entry in found] == ids
        entries += found
    return entries


@both
def test_log_probabilities_come_with_each_id_and_its_text(setting: Setting, is_streaming: bool) -> None:
    plain = setting.begin(is_streaming, "été", max_tokens=30, ignore_eos=True).wait()
    assert {reply["logprobs"][0, 0] for reply in plain.replies} == {b""}
    answer = setting.begin(is_streaming, "été", max_tokens=30, ignore_eos=True, logprobs=3, echo=True).wait()
    assert answer.ids == plain.ids
    entries = logprobs_of(answer)
    for entry in entries:
        assert set(entry) == {"id", "text", "logprob", "top"}
        assert entry["text"] == setting.tokenizer.name(entry["id"])
        assert len(entry["top"]) == 3
        # Greedy: the token is the likeliest one.
        assert entry["top"][0] == {key: entry[key] for key in ("id", "text", "logprob")}
        assert [other["logprob"] for other in entry["top"]] == sorted(
            (other["logprob"] for other in entry["top"]), reverse=True
        )
        assert entry["logprob"] < 0


@both
def test_a_stop_string_cuts_log_probabilities_as_it_cuts_ids(setting: Setting, is_streaming: bool) -> None:
    free = setting.begin(is_streaming, max_tokens=40, ignore_eos=True, logprobs=1).wait()
    stop = free.text[5:8]
    cut = setting.begin(is_streaming, max_tokens=200, ignore_eos=True, logprobs=1, stop=stop).wait()
    assert (cut.finish_reason, len(cut.ids) < 40) == ("stop", True)
    assert [entry["id"] for entry in logprobs_of(cut)] == cut.ids
    found = [[(e["id"], e["logprob"]) for e in logprobs_of(answer)] for answer in (cut, free)]
    assert found[0] == [(i, pytest.approx(value)) for i, value in found[1][: len(cut.ids)]]


def test_rows_of_a_batch_ask_each_for_its_own(setting: Setting) -> None:
    rows = [
        {"max_tokens": 3, "logprobs": 2},
        {"max_tokens": 5, "adapter_id": "a"},
        {"max_tokens": 4, "adapter_id": "a", "adapter_scale": 0, "logprobs": 1, "echo": True},
        {"max_tokens": 60, "repetition_penalty": 100, "request_priority": 9, "deadline_ms": 10**6},
    ]
    batch = setting.begin(
        False, {**tensors(["same"] * 4), "sampling_parameters": row_parameters(*rows)}, ignore_eos=True
    ).wait()
    (reply,) = batch.replies
    ids = [[i for i in row if i >= 0] for row in reply["output_ids"].tolist()]
    for row, found in zip(rows, ids, strict=True):
        alone = setting.begin(False, "same", ignore_eos=True, **row).wait()
        assert alone.ids == found
    assert [bool(text) for text in reply["logprobs"][:, 0]] == [True, False, True, False]
    for i, count in ((0, 2), (2, 1)):
        entries = json.loads(reply["logprobs"][i, 0])
        assert [entry["id"] for entry in entries] == ids[i]
        assert {len(entry["top"]) for entry in entries} == {count}
    assert reply["text_output"][2, 0].startswith(b"same")
    # Scale 0 is the base model, the adapter as it is and a penalty are not.
    base = setting.begin(False, "same", ignore_eos=True, max_tokens=60).wait().ids
    assert ids[2] == base[:4]
    assert ids[1] != base[:5]
    assert len(set(base)) < len(base)
    assert len(set(ids[3])) == len(ids[3])


@both
def test_a_deadline_ends_a_request_and_frees_its_sequence(setting: Setting, is_streaming: bool) -> None:
    answer = setting.begin(is_streaming, max_tokens=250, ignore_eos=True, deadline_ms=1).wait()
    assert isinstance(answer.error, UnavailableError)
    assert answer.error.message.startswith("deadline_ms=1 passed")
    wait_until(lambda: setting.status().gauges["running"] == 0)


@both
def test_a_deadline_that_does_not_pass_changes_nothing(setting: Setting, is_streaming: bool) -> None:
    plain = setting.begin(is_streaming, max_tokens=9).wait()
    assert setting.begin(is_streaming, max_tokens=9, deadline_ms=10**6).wait().ids == plain.ids


@both
def test_a_deadline_holds_though_the_engine_hangs(
    setting: Setting, is_streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = setting.begin(is_streaming, max_tokens=5).wait().ids
    hangs, gate = threading.Event(), threading.Event()
    launch = Runner.launch

    def hang(self: Runner, *step: Any) -> Any:
        hangs.set()
        assert gate.wait(WAIT_S)
        return launch(self, *step)

    monkeypatch.setattr(Runner, "launch", hang)
    try:
        patient = setting.begin(is_streaming, max_tokens=5)
        assert hangs.wait(WAIT_S)
        hurried = setting.begin(is_streaming, max_tokens=5, deadline_ms=50)
        rows = row_parameters({}, {"deadline_ms": 10**6}, {"deadline_ms": 60})
        batch = setting.begin(False, {**tensors(["a", "b", "c"]), "sampling_parameters": rows})
        for answer, deadline_ms in ((hurried, 50), (batch, 60)):
            answer.wait()
            assert isinstance(answer.error, UnavailableError)
            assert answer.error.message.startswith(f"deadline_ms={deadline_ms} passed after 0 tokens")
            assert answer.replies == []
        assert patient.num_finals == 0
    finally:
        gate.set()
    assert patient.wait().ids == expected
    wait_until(lambda: setting.status().gauges["waiting"] == setting.status().gauges["running"] == 0)
    assert (hurried.num_finals, batch.num_finals, patient.num_finals) == (1, 1, 1)
