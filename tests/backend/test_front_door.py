"""A front door that knows nothing of Triton: plain prompts in, plain answers out, on a real engine."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from manylora.errors import (
    CancelledRequestError,
    InvalidArgumentError,
    ManyloraError,
    NotFoundError,
    UnavailableError,
)
from manylora.front_end.answer import Answer
from manylora.front_end.front_end import LONG_BYTES, FrontEnd
from manylora.front_end.prompt import Prompt
from manylora.front_end.responder import Responder
from manylora.messages import SamplingParams, TokenLogprobs

from .front_end_setting import WAIT_S, Setting, running_setting, wait_until


class Mailbox(Responder):
    """Passes replies on to an event loop, as a server with many open streams does."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, is_streaming: bool = True) -> None:
        self.request_id = "m1"
        self.is_streaming = is_streaming
        self.client_has_gone = False
        self.threads: set[str] = set()
        self._loop = loop
        self._replies: asyncio.Queue[tuple[Sequence[Answer] | ManyloraError, bool]] = asyncio.Queue()

    def send(self, answers: Sequence[Answer], *, is_last: bool) -> None:
        self._post(answers, is_last)

    def fail(self, error: ManyloraError) -> None:
        self._post(error, True)

    def is_cancelled(self) -> bool:
        return self.client_has_gone

    def _post(self, reply: Sequence[Answer] | ManyloraError, is_last: bool) -> None:
        self.threads.add(threading.current_thread().name)
        self._loop.call_soon_threadsafe(self._replies.put_nowait, (reply, is_last))

    @property
    def is_empty(self) -> bool:
        return self._replies.empty()

    async def next(self) -> tuple[Sequence[Answer], bool]:
        """The next reply and whether it is the last; raises where that is an error."""
        reply, is_last = await asyncio.wait_for(self._replies.get(), WAIT_S)
        if isinstance(reply, ManyloraError):
            raise reply
        return reply, is_last

    async def all(self) -> list[Sequence[Answer]]:
        replies, is_last = [], False
        while not is_last:
            answers, is_last = await self.next()
            replies.append(answers)
        await asyncio.sleep(0)
        assert self._replies.empty()
        return replies


@pytest.fixture(scope="module")
def setting(
    tiny_model: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp("front_door")
    with running_setting(tiny_model("llama"), directory) as running:
        make_adapter(tiny_model("llama"), directory / "adapters" / "a", 0, r=8, target_modules=["q_proj"])
        yield running


@pytest.fixture
def front_end(setting: Setting) -> FrontEnd:
    return setting.front_end(True)


def sampling(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)


async def ask(front_end: FrontEnd, *prompts: Prompt, is_streaming: bool = True) -> list[Sequence[Answer]]:
    mailbox = Mailbox(asyncio.get_running_loop(), is_streaming=is_streaming)
    front_end.submit(prompts, mailbox)
    return await mailbox.all()


def ids_of(replies: list[Sequence[Answer]], row: int = 0) -> list[int]:
    return [token_id for answers in replies for token_id in answers[row].token_ids]


def text_of(replies: list[Sequence[Answer]], row: int = 0) -> str:
    return "".join(answers[row].text for answers in replies)


def test_a_stream_and_a_whole_answer_of_one_front_end_say_the_same(
    setting: Setting, front_end: FrontEnd
) -> None:
    prompt = Prompt(text="hi", adapter_id="a", params=sampling(24))

    async def both() -> tuple[list[Sequence[Answer]], list[Sequence[Answer]]]:
        stream, whole = await asyncio.gather(
            ask(front_end, prompt), ask(front_end, prompt, is_streaming=False)
        )
        return stream, whole

    stream, whole = asyncio.run(both())
    assert len(whole) == 1
    assert len(stream) > 1
    assert (
        ids_of(stream)
        == ids_of(whole)
        == setting.begin(False, adapter_id="a", max_tokens=24, ignore_eos=True).wait().ids
    )
    assert text_of(stream) == text_of(whole) == setting.tokenizer.decode(ids_of(whole))
    assert [answers[0].finish_reason for answers in stream] == [""] * (len(stream) - 1) + ["length"]
    (answer,) = whole[0]
    assert (answer.num_input_tokens, answer.num_output_tokens, answer.logprobs) == (2, 24, None)
    assert answer.adapter_version != ""


def test_each_kind_of_prompt_and_several_in_one_stream(setting: Setting, front_end: FrontEnd) -> None:
    ids = setting.tokenizer.encode("été")
    prompts = [
        Prompt(text="été", params=sampling(5)),
        Prompt(text="été".encode(), params=sampling(7), echo=True),
        Prompt(input_ids=ids, params=sampling(5)),
        Prompt(input_ids=tuple(ids), adapter_id="a", params=sampling(6)),
    ]
    replies = asyncio.run(ask(front_end, *prompts))
    found = [ids_of(replies, row) for row in range(4)]
    assert [len(row) for row in found] == [5, 7, 5, 6]
    assert found[0] == found[2] == found[1][:5]
    assert found[3][:5] != found[0]
    assert text_of(replies, 1).startswith("été")


def test_log_probabilities_come_in_the_responders_own_form(front_end: FrontEnd) -> None:
    class Naming(Mailbox):
        def format_logprobs(
            self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Any
        ) -> list[str]:
            return [tokenizer.name(token_id) for token_id in token_ids]

    prompt = Prompt(text="hi", params=sampling(9, logprobs=2))

    async def run() -> None:
        (reply,) = await ask(front_end, prompt, is_streaming=False)
        assert reply[0].logprobs is not None
        assert [len(entry.top) for entry in reply[0].logprobs] == [2] * 9
        naming = Naming(asyncio.get_running_loop())
        front_end.submit([prompt], naming)
        for answers in await naming.all():
            assert len(answers[0].logprobs or ()) == len(answers[0].token_ids)

    asyncio.run(run())


def test_a_client_that_leaves_a_stream_frees_its_sequence(setting: Setting, front_end: FrontEnd) -> None:
    async def run() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        front_end.submit([Prompt(text="hi", params=sampling(250))], mailbox)
        await mailbox.next()
        mailbox.client_has_gone = True
        with pytest.raises(CancelledRequestError):
            await mailbox.all()

    asyncio.run(run())
    wait_until(lambda: setting.status().gauges["running"] == 0)


REFUSED: dict[str, tuple[list[Prompt], type[ManyloraError], str]] = {
    "no prompts": ([], InvalidArgumentError, "no prompts"),
    "no tokens": ([Prompt(text="")], InvalidArgumentError, "no tokens"),
    "too long": ([Prompt(text="x" * 2817)], InvalidArgumentError, "2817 characters"),
    "outside the vocabulary": ([Prompt(input_ids=[5, 300])], InvalidArgumentError, "got 300"),
    "a stop token outside": (
        [Prompt(text="x", params=SamplingParams(stop_token_ids=(300,)))],
        InvalidArgumentError,
        "got 300",
    ),
    "no template": (
        [Prompt(messages=[{"role": "user", "content": "hi"}])],
        ManyloraError,
        "no chat template",
    ),
    "unknown adapter": ([Prompt(text="x"), Prompt(text="x", adapter_id="absent")], NotFoundError, "absent"),
    "late": (
        [Prompt(text="x", deadline_ms=1, params=sampling(250))],
        UnavailableError,
        "deadline_ms=1 passed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_fails_alone(front_end: FrontEnd, case: str) -> None:
    prompts, kind, words = REFUSED[case]

    async def run() -> None:
        beside = asyncio.create_task(ask(front_end, Prompt(text="hi", params=sampling(4))))
        with pytest.raises(kind, match=words):
            await ask(front_end, *prompts)
        assert len(ids_of(await beside)) == 4

    asyncio.run(run())


def test_requests_from_several_threads_get_their_own_answers_on_one_thread(
    setting: Setting, front_end: FrontEnd
) -> None:
    """Long ones among them, which go through the other thread."""
    num_threads, num_each = 4, 50
    alone = [setting.begin(False, f"p{n}", max_tokens=6, ignore_eos=True).wait().ids for n in range(3)]

    async def run() -> None:
        loop = asyncio.get_running_loop()
        mailboxes = [[Mailbox(loop) for _ in range(num_each)] for _ in range(num_threads)]

        def submit(mine: list[Mailbox]) -> None:
            for number, mailbox in enumerate(mine):
                long = [5] * (LONG_BYTES * 17) if number % 10 == 9 else None
                text = f"p{number % 3}" if long is None else None
                front_end.submit([Prompt(text=text, input_ids=long, params=sampling(6))], mailbox)

        await asyncio.gather(*(asyncio.to_thread(submit, mine) for mine in mailboxes))
        for mine in mailboxes:
            for number, mailbox in enumerate(mine):
                if number % 10 == 9:
                    with pytest.raises(InvalidArgumentError):
                        await mailbox.all()
                else:
                    assert ids_of(await mailbox.all()) == alone[number % 3]
        assert {name for mine in mailboxes for mailbox in mine for name in mailbox.threads} == {
            "manylora-reply"
        }

    asyncio.run(run())
    wait_until(lambda: setting.status().gauges["running"] == 0)


def test_whatever_is_submitted_while_the_front_end_closes_gets_one_last_reply(setting: Setting) -> None:
    num_threads, num_each = 4, 40
    closing = FrontEnd(setting.path)
    assert closing.wait_ready(WAIT_S)
    begun = threading.Barrier(num_threads + 1)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        mailboxes = [[Mailbox(loop) for _ in range(num_each)] for _ in range(num_threads)]

        def submit(mine: list[Mailbox]) -> None:
            begun.wait(WAIT_S)
            for number, mailbox in enumerate(mine):
                long = [5] * (LONG_BYTES * 17) if number % 10 == 9 else None
                closing.submit(
                    [Prompt(text=None if long else "x", input_ids=long, params=sampling(4))], mailbox
                )

        def close() -> None:
            begun.wait(WAIT_S)
            closing.close()

        await asyncio.gather(asyncio.to_thread(close), *(asyncio.to_thread(submit, m) for m in mailboxes))
        refused = []
        for mailbox in itertools.chain.from_iterable(mailboxes):
            try:
                await mailbox.all()
            except (UnavailableError, InvalidArgumentError) as error:
                refused.append(error)
            assert mailbox.is_empty
        late = Mailbox(loop)
        closing.submit([Prompt(text="x")], late)
        with pytest.raises(UnavailableError):
            await late.all()
        assert any(isinstance(error, UnavailableError) for error in refused)

    asyncio.run(run())
    wait_until(lambda: setting.status().gauges["running"] == 0)
