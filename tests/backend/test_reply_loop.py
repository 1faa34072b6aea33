"""The reply loop fed by hand: what has been put and what has been handled is known at every moment."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from manylora.errors import InternalError, InvalidArgumentError, UnavailableError
from manylora.front_end import reply_loop
from manylora.front_end.answer import GrowingAnswer
from manylora.front_end.call import Call
from manylora.front_end.protocol import Tensors
from manylora.front_end.reply_loop import Lost, Refused, ReplyLoop
from manylora.front_end.text import Tokenizer
from manylora.front_end.text_stream import TextStream
from manylora.messages import Failed, Tokens

from .conftest import byte_tokenizer
from .faults import FaultyRecorder, every_fault, make
from .front_end_setting import WAIT_S, Recorder


class Fed:
    """A reply loop without an engine."""

    def __init__(self, *, is_streaming: bool = True) -> None:
        self.tokenizer = Tokenizer(byte_tokenizer())
        self.cancelled: list[int] = []
        self.is_streaming = is_streaming
        self.loop = ReplyLoop(cancel=self.cancelled.append)
        self._ids = itertools.count(1)

    def call(
        self, num_rows: int = 1, recorder: Recorder | None = None, **options: Any
    ) -> tuple[Recorder, Call]:
        answers = [
            GrowingAnswer(
                id=next(self._ids), num_input_tokens=1, stream=TextStream(self.tokenizer), **options
            )
            for _ in range(num_rows)
        ]
        call = Call(recorder or Recorder(is_streaming=self.is_streaming), answers)
        self.loop.put(call)
        assert isinstance(call.responder, Recorder)
        return call.responder, call

    def say(self, *calls: Call, finish_reason: str = "") -> None:
        """One more token for every row, in one step."""
        self.loop.put(
            [
                Tokens(id=answer.id, token_ids=[70], finish_reason=finish_reason)
                for call in calls
                for answer in call.answers
            ]
        )

    def serves(self) -> bool:
        recorder, call = self.call()
        self.say(call)
        self.say(call, finish_reason="stop")
        return len(recorder.wait().ids) == 2


@pytest.fixture
def fed() -> Iterator[Fed]:
    made = Fed()
    yield made
    made.loop.close()


class Trap:
    """Raises once, when armed, before or after what it stands for."""

    def __init__(self, work: Callable[..., Any], fault: type[BaseException], *, is_after: bool) -> None:
        self._work, self._fault, self._is_after = work, fault, is_after
        self.is_armed = threading.Event()
        self.has_struck = threading.Event()

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.is_armed.is_set():
            return self._work(*args, **options)
        if self._is_after:
            self._work(*args, **options)
        self.is_armed.clear()
        self.has_struck.set()
        raise make(self._fault)


@every_fault
@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", ["_turn", "_fetch_items", "_handle", "_reply", "_check_calls", "_fail"])
def test_a_fault_of_the_loop_itself_ends_all_calls_and_the_loop_goes_on(
    fed: Fed, monkeypatch: pytest.MonkeyPatch, place: str, is_after: bool, fault: type[BaseException]
) -> None:
    trap = Trap(getattr(ReplyLoop, place), fault, is_after=is_after)
    monkeypatch.setattr(ReplyLoop, place, lambda self, *args: trap(self, *args))
    calls = [fed.call() for _ in range(3)] + [fed.call(num_rows=3)]
    fed.say(*(call for _, call in calls))
    for recorder, _ in calls:
        assert recorder.first.wait(WAIT_S)
    trap.is_armed.set()
    if place == "_fail":
        fed.loop.put([Failed(calls[0][1].answers[0].id, "UNAVAILABLE", "no")])
    if place == "_reply":
        fed.say(*(call for _, call in calls), finish_reason="stop")
    late = [fed.call() for _ in range(2)]
    assert trap.has_struck.wait(WAIT_S)
    # What came in the very turn of the fault is ended too, or is handled.
    fed.say(*(call for _, call in late), finish_reason="stop")
    for recorder, _ in calls + late:
        recorder.wait()
    assert fed.serves()
    assert [recorder.num_finals for recorder, _ in calls + late] == [1] * 6
    ended = {answer.id for recorder, call in calls if recorder.error for answer in call.answers}
    assert place == "_reply" or all(recorder.error for recorder, _ in calls)
    # Those that the engine had ended itself need no cancelling.
    assert place in ("_reply", "_fail") or ended == set(fed.cancelled) & ended


def test_a_whole_answer_is_sent_though_the_engine_is_lost_in_the_same_turn(fed: Fed) -> None:
    class Held(Recorder):
        """Holds the loop up at its first reply."""

        def __init__(self) -> None:
            super().__init__()
            self.is_open = threading.Event()

        def send_tensors(self, outputs: Tensors, *, is_last: bool) -> None:
            super().send_tensors(outputs, is_last=is_last)
            assert self.is_open.wait(WAIT_S)

    held = Held()
    _, first = fed.call(recorder=held)
    whole, second = fed.call()
    half, third = fed.call()
    fed.say(first)
    assert held.first.wait(WAIT_S)
    # All of this is taken in one turn, when the loop comes round.
    fed.say(second, finish_reason="stop")
    fed.say(third)
    fed.loop.put(Lost())
    held.is_open.set()
    assert whole.wait().error is None
    assert (whole.finish_reason, len(whole.ids)) == ("stop", 1)
    for cut in (held, half):
        assert isinstance(cut.wait().error, UnavailableError)
    assert [recorder.num_finals for recorder in (held, whole, half)] == [1, 1, 1]


@every_fault
def test_a_clock_that_fails_ends_all_calls_and_the_loop_goes_on(
    fed: Fed, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    trap = Trap(reply_loop.time.monotonic, fault, is_after=False)
    clock = type("Clock", (), {"monotonic": staticmethod(trap)})
    monkeypatch.setattr(reply_loop, "time", clock)
    recorder, _ = fed.call()
    trap.is_armed.set()
    assert isinstance(recorder.wait().error, InternalError)
    assert fed.serves()


@every_fault
def test_a_log_that_cannot_be_written_costs_nobody_an_answer(
    fed: Fed, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    def strike(*args: Any, **options: Any) -> None:
        raise make(fault)

    monkeypatch.setattr(reply_loop.log, "error", strike)
    recorder, call = fed.call(recorder=FaultyRecorder("send", fault))
    fed.say(call)
    assert isinstance(recorder.wait().error, InternalError)
    assert fed.serves()


def test_events_that_make_no_sense_harm_nobody(fed: Fed) -> None:
    recorder, call = fed.call()
    fed.loop.put([Failed(999, "INTERNAL", "of nobody"), Tokens(id=-1, token_ids=[])])
    fed.say(call)
    assert recorder.first.wait(WAIT_S)
    fed.loop.put([None])  # type: ignore[list-item]  # what no engine sends
    assert isinstance(recorder.wait().error, InternalError)
    fed.loop.put(None)  # type: ignore[arg-type]
    assert fed.serves()


def test_an_item_that_fails_ends_the_request_in_it(fed: Fed) -> None:
    recorder = Recorder()
    fed.loop.put(Call(recorder, [None]))  # type: ignore[list-item]  # what no front end makes
    recorder.wait()
    assert isinstance(recorder.error, InternalError)
    refused = Recorder()
    fed.loop.put(Refused(refused, InvalidArgumentError("no")))
    assert isinstance(refused.wait().error, InvalidArgumentError)


def test_the_loss_of_the_engine_spares_what_is_finished(fed: Fed) -> None:
    (lost, first), (done, second) = fed.call(num_rows=2), fed.call(num_rows=2)
    fed.loop.put([Tokens(id=first.answers[0].id, token_ids=[70], finish_reason="stop")])
    fed.say(second, finish_reason="length")
    fed.loop.put(Lost())
    assert isinstance(lost.wait().error, UnavailableError)
    assert done.wait().error is None or isinstance(done.error, UnavailableError)
    assert (lost.num_finals, done.num_finals) == (1, 1)


def test_the_earliest_deadline_of_what_has_not_finished_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    clock = type("Clock", (), {"monotonic": staticmethod(lambda: now_s[0])})
    monkeypatch.setattr(reply_loop, "time", clock)
    fed = Fed(is_streaming=False)
    try:
        recorder, call = fed.call(num_rows=3)
        call.answers[0].deadline_ms, call.answers[0].deadline_s = 1000, 101.0
        call.answers[1].deadline_ms, call.answers[1].deadline_s = 5000, 105.0
        timeless, _ = fed.call()
        fed.loop.put([Tokens(id=call.answers[0].id, token_ids=[70], finish_reason="stop")])

        def settle() -> None:
            """Wait until the loop has handled all that was put, and has looked at the calls at this time."""
            for _ in range(3):
                probe, probed = fed.call()
                fed.say(probed, finish_reason="stop")
                probe.wait()

        settle()
        assert call.next_deadline is call.answers[1]
        for now_s[0] in (101.5, 105.0, 105.2):
            settle()
            assert recorder.num_finals == 0
        now_s[0] = 105.3
        assert isinstance(recorder.wait().error, UnavailableError)
        assert recorder.error.message.startswith("deadline_ms=5000 passed after 0 tokens")
        assert fed.cancelled == [call.answers[1].id, call.answers[2].id]
        assert timeless.num_finals == 0
    finally:
        fed.loop.close()
    assert isinstance(timeless.wait().error, UnavailableError)


def test_the_engines_own_word_on_a_deadline_comes_first(fed: Fed) -> None:
    recorder, call = fed.call(deadline_ms=5, deadline_s=0.0)
    fed.loop.put([Failed(call.answers[0].id, "UNAVAILABLE", "deadline_ms=5 passed while waiting")])
    assert recorder.wait().error is not None
    assert recorder.error.message == "deadline_ms=5 passed while waiting"
