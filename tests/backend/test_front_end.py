"""A front end on a real engine (a tiny random model) behind a real socket, with a responder that records."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manylora import run_dir
from manylora.config import EngineConfig
from manylora.engine.engine import Engine
from manylora.engine.server import EngineServer
from manylora.errors import (
    CancelledRequestError,
    InternalError,
    InvalidArgumentError,
    ManyloraError,
    NotFoundError,
    UnavailableError,
)
from manylora.front_end import FrontEnd
from manylora.ipc import query_status
from manylora.protocol import Tensors
from manylora.text import Tokenizer

WAIT_S = 60


class Recorder:
    """Holds what one request was answered, and refuses anything after the last reply, as Triton does."""

    def __init__(self, *, fail_sends: int = 0) -> None:
        self.request_id = "r1"
        self.replies: list[Tensors] = []
        self.error: ManyloraError | None = None
        self.num_finals = 0
        self.client_has_gone = False
        self.first = threading.Event()
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._fail_sends = fail_sends

    def send(self, outputs: Tensors, *, is_last: bool) -> None:
        if self._fail_sends:
            self._fail_sends -= 1
            raise RuntimeError("a fault of the sender")
        assert not self.num_finals
        self.replies.append(outputs)
        self.first.set()
        if is_last:
            self._end()

    def fail(self, error: ManyloraError) -> None:
        assert not self.num_finals
        self.error = error
        self._end()

    def is_cancelled(self) -> bool:
        return self.client_has_gone

    def _end(self) -> None:
        self.num_finals += 1
        self.done.put(None)

    def wait(self) -> Recorder:
        self.done.get(timeout=WAIT_S)
        return self

    @property
    def text(self) -> str:
        return b"".join(reply["text_output"][0, 0] for reply in self.replies).decode()

    @property
    def ids(self) -> list[int]:
        return [int(i) for reply in self.replies for i in reply["output_ids"][0]]

    @property
    def finish_reason(self) -> str:
        return str(self.replies[-1]["finish_reason"][0, 0].decode())


class Setting:
    """An engine that can be stopped and started, and front ends on its socket."""

    def __init__(self, config: EngineConfig, path: Path) -> None:
        self._config = config
        self.path = path
        self.engine: Engine | None = None
        self.server: EngineServer | None = None
        self.front_ends: dict[bool, FrontEnd] = {}
        self.tokenizer = Tokenizer.load(config.base_model)

    def start_engine(self) -> None:
        self.engine = Engine(self._config)
        self.server = EngineServer(self.engine, self.path)

    def stop_engine(self) -> None:
        if self.engine and self.server:
            self.server.close()
            self.engine.close()

    def front_end(self, is_streaming: bool) -> FrontEnd:
        if is_streaming not in self.front_ends:
            self.front_ends[is_streaming] = FrontEnd(self.path, is_streaming=is_streaming)
        assert self.front_ends[is_streaming].wait_ready(WAIT_S)
        return self.front_ends[is_streaming]

    def begin(
        self, is_streaming: bool, prompt: Any = "hi", recorder: Recorder | None = None, **parameters: Any
    ) -> Recorder:
        recorder = recorder or Recorder()
        self.front_end(is_streaming).submit(recorder, tensors(prompt), json.dumps(parameters))
        return recorder

    def status(self) -> Any:
        status = query_status(self.path, WAIT_S)
        assert status.check_errors == []
        return status


def tensors(prompt: Any) -> Tensors:
    """Text, ids, or a list of texts for a batch."""
    if isinstance(prompt, dict):
        return prompt
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        return {"input_ids": np.array([prompt], dtype=np.int32)}
    texts = [prompt] if isinstance(prompt, str) else prompt
    column = np.empty((len(texts), 1), dtype=np.object_)
    column[:, 0] = [text.encode() for text in texts]
    return {"text_input": column}


@pytest.fixture(scope="module")
def module_setting(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("front_end")
    (directory / "adapters").mkdir()
    config = EngineConfig(
        base_model=str(tiny_model("llama")),
        adapter_root=str(directory / "adapters"),
        max_loras=2,
        max_lora_rank=16,
        num_threads=1,
        max_num_seqs=8,
    )
    setting = Setting(config, run_dir.socket_path(run_dir.prepare(directory / "run"), "llm"))
    setting.start_engine()
    yield setting
    for front_end in setting.front_ends.values():
        front_end.close()
    setting.stop_engine()


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
    "far too long": ("x" * 100_000, {}, InvalidArgumentError, "100000 characters"),
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
    setting.front_end(False).submit(recorder, tensors("hi"), "{not json")
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
    front_end.submit(refused, tensors("hi"), "")
    assert isinstance(refused.wait().error, UnavailableError)
    setting.start_engine()
    assert setting.begin(is_streaming, max_tokens=5).wait().ids == expected


def test_closing_fails_what_is_in_flight_and_frees_it(setting: Setting) -> None:
    front_end = FrontEnd(setting.path, is_streaming=False)
    assert front_end.wait_ready(WAIT_S)
    answers = [Recorder() for _ in range(3)]
    for answer in answers:
        front_end.submit(answer, tensors("hi"), '{"max_tokens": 250, "ignore_eos": true}')
    front_end.close()
    for answer in answers:
        assert isinstance(answer.wait().error, UnavailableError)
        assert answer.num_finals == 1
    wait_until(lambda: setting.status().gauges["running"] == 0)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Ask again until it is so."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
