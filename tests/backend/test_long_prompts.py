"""Long prompts and parameters are read apart: nobody waits for them, and they end like any other request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from manylora.errors import CancelledRequestError, InvalidArgumentError, UnavailableError
from manylora.front_end import front_end as module
from manylora.front_end import long_prompts
from manylora.front_end.front_end import FrontEnd
from manylora.front_end.protocol import Tensors
from manylora.front_end.tensor_door import TensorRequest

from .front_end_setting import WAIT_S, Recorder, Setting, running_setting, tensors, wait_until

LONG = "long " * 8


class Gate:
    """Holds a tokenizer up at long prompts."""

    def __init__(self, front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = front_end._tokenizer
        assert tokenizer is not None
        self._encode = tokenizer.encode
        self.is_open, self.has_come = threading.Event(), threading.Event()
        self.num_encoded = 0
        monkeypatch.setattr(tokenizer, "encode", self._wait)

    def _wait(self, text: str, **options: bool) -> list[int]:
        if text.startswith(LONG):
            self.has_come.set()
            assert self.is_open.wait(WAIT_S)
            self.num_encoded += 1
        return self._encode(text, **options)


@pytest.fixture(scope="module")
def setting(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with running_setting(tiny_model("llama"), tmp_path_factory.mktemp("long_prompts")) as running:
        yield running


@pytest.fixture(params=[False, True], ids=["unary", "stream"])
def is_streaming(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def gate(setting: Setting, is_streaming: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.setattr(module, "LONG_BYTES", len(LONG) - 1)
    gate = Gate(setting.front_end(is_streaming), monkeypatch)
    yield gate
    gate.is_open.set()


def held(setting: Setting, is_streaming: bool, gate: Gate, **parameters: object) -> Recorder:
    """A long request whose prompt is being tokenised."""
    gate.has_come.clear()
    answer = setting.begin(is_streaming, LONG, max_tokens=4, **parameters)
    assert gate.has_come.wait(WAIT_S)
    return answer


def test_others_are_answered_while_a_long_prompt_is_tokenised(
    setting: Setting, is_streaming: bool, gate: Gate
) -> None:
    long = held(setting, is_streaming, gate)
    short = setting.begin(is_streaming, "hi", max_tokens=4).wait()
    assert short.error is None
    assert long.num_finals == 0
    gate.is_open.set()
    assert long.wait().error is None
    assert len(long.ids) == 4
    assert long.ids == setting.begin(is_streaming, setting.tokenizer.encode(LONG), max_tokens=4).wait().ids


def with_parameters(prompt: str, num_rows: int = 1, **last: object) -> Tensors:
    """A batch of prompts, each with long parameters that say nothing, but for what the last one says."""
    rows: list[dict[str, object]] = [{"triton_x": [[]] * 200} for _ in range(num_rows)]
    rows[-1].update(last)
    tensor = np.empty((num_rows, 1), dtype=np.object_)
    tensor[:, 0] = [json.dumps(row).encode() for row in rows]
    return {**tensors([prompt] * num_rows), "sampling_parameters": tensor}


def test_long_parameters_are_not_read_on_the_thread_of_all_requests(
    setting: Setting, is_streaming: bool, gate: Gate
) -> None:
    held(setting, is_streaming, gate)
    num_rows = 1 if is_streaming else 64
    right = setting.begin(is_streaming, with_parameters("hi", num_rows, max_tokens=4), max_tokens=2)
    wrong = setting.begin(is_streaming, with_parameters("hi", num_rows, top_k=-1))
    gone = setting.begin(is_streaming, with_parameters("hi", num_rows))
    gone.client_has_gone = True
    assert isinstance(gone.wait().error, CancelledRequestError)
    short = setting.begin(is_streaming, "hi", max_tokens=2).wait()
    # Refusals are sent in the order in which they are found: before this answer, had it been read.
    assert [wrong.num_finals, right.num_finals] == [0, 0]
    gate.is_open.set()
    assert isinstance(wrong.wait().error, InvalidArgumentError)
    assert wrong.error is not None
    assert wrong.error.message.startswith("sampling_parameters key top_k: got -1, allowed is")
    assert right.wait().error is None
    # Each row has been given its own stream.
    assert [reply["output_ids"].shape[0] for reply in right.replies] == [num_rows] * len(right.replies)
    assert right.ids == short.ids


def test_long_parameters_are_measured_over_all_sequences() -> None:
    batch = with_parameters("hi", 64)
    alone = with_parameters("hi", 1)
    assert TensorRequest(alone, "").parsing_cost < module.LONG_BYTES // 16
    num_bytes = 64 * len(alone["sampling_parameters"][0, 0])
    assert TensorRequest(batch, "").parsing_cost == num_bytes // 4
    assert TensorRequest(batch, "x" * 400).parsing_cost == (num_bytes + 400) // 4
    assert (
        TensorRequest(with_parameters("hi", 64, triton_x=[[]] * 16_000), "").parsing_cost > module.LONG_BYTES
    )


def test_a_client_that_leaves_ends_what_waits_and_it_never_reaches_the_engine(
    setting: Setting, is_streaming: bool, gate: Gate
) -> None:
    num_accepted = setting.status().counters["accepted"]
    first = held(setting, is_streaming, gate)
    second = setting.begin(is_streaming, LONG, max_tokens=4)
    for answer in (first, second):
        answer.client_has_gone = True
        assert isinstance(answer.wait().error, CancelledRequestError)
    gate.is_open.set()
    last = setting.begin(is_streaming, LONG, max_tokens=1).wait()
    assert last.error is None
    # The first was being tokenised when it ended; the second was not any more.
    assert gate.num_encoded == 2
    wait_until(lambda: setting.status().gauges["running"] == 0)
    assert setting.status().counters["accepted"] - num_accepted <= 2
    assert [answer.num_finals for answer in (first, second, last)] == [1, 1, 1]


def test_a_deadline_counts_from_the_arrival_and_passes_while_a_prompt_waits(
    setting: Setting, is_streaming: bool, gate: Gate
) -> None:
    held(setting, is_streaming, gate)
    late = setting.begin(is_streaming, LONG, max_tokens=4, deadline_ms=1).wait()
    assert isinstance(late.error, UnavailableError)
    assert late.error.message == "deadline_ms=1 passed while the prompt waited to be tokenised"


def test_more_long_prompts_than_may_wait_are_refused(
    setting: Setting, is_streaming: bool, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_prompts, "MAX_LONG", 1)
    first = held(setting, is_streaming, gate)
    second = setting.begin(is_streaming, LONG, max_tokens=4)
    third = setting.begin(is_streaming, LONG, max_tokens=4).wait()
    assert isinstance(third.error, UnavailableError)
    assert third.error.message == "1 requests with long prompts wait to be tokenised; try again later"
    gate.is_open.set()
    assert first.wait().ids == second.wait().ids


def test_a_long_prompt_that_is_refused_fails_alone(setting: Setting, is_streaming: bool, gate: Gate) -> None:
    gate.is_open.set()
    answer = setting.begin(is_streaming, LONG * 1000, max_tokens=4).wait()
    assert isinstance(answer.error, InvalidArgumentError)
    assert setting.begin(is_streaming, LONG, max_tokens=4).wait().error is None


def test_closing_ends_what_waits(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_BYTES", len(LONG) - 1)
    setting.front_ends.pop(False, None)
    front_end = setting.front_end(False)
    gate = Gate(front_end, monkeypatch)
    answers = [held(setting, False, gate), *(setting.begin(False, LONG) for _ in range(3))]
    answers.append(setting.begin(False, with_parameters("hi", 2)))
    closing = threading.Thread(target=front_end.close)
    closing.start()
    for answer in answers:
        assert isinstance(answer.wait().error, UnavailableError)
    gate.is_open.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    del setting.front_ends[False]
    wait_until(lambda: setting.status().gauges["running"] == 0)
