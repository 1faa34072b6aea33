"""What is AsyncClient's own: cancellation, many requests at once, event loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from manylora_client import AsyncClient, Cancelled, ConnectionFailed, InvalidArgument, Timeout

from .scripted_grpc import HOLD as HOLD_CALL
from .scripted_grpc import CrowdTriton, ScriptedTriton, reply, response, running
from .scripted_http import ANSWER, HOLD, ByteServer, CrowdServer, event, events

WAIT_S = 30
UNFINISHED = events(event(finish_reason=""))[: -len(b"0\r\n\r\n")]

CALLS: dict[str, Callable[[AsyncClient], Awaitable[Any]]] = {
    "generate": lambda client: client.generate("x"),
    "stream": lambda client: client.stream("x").collect(),
    "chat": lambda client: client.chat("x"),
}


@dataclass(frozen=True, slots=True)
class Held:
    """A server that says nothing more to its one request."""

    url: str
    arrived: threading.Event
    left: threading.Event
    """The client has cancelled."""


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def silent(protocol: str) -> Iterator[Held]:
    """A server that does not answer."""
    with _held(protocol, [HOLD], [HOLD_CALL]) as held:
        yield held


@pytest.fixture
def halting(protocol: str) -> Iterator[Held]:
    """A server that stops after a stream's first reply."""
    with _held(protocol, [UNFINISHED, HOLD], [reply(response(finish="", final=False)), HOLD_CALL]) as held:
        yield held


@contextlib.contextmanager
def _held(protocol: str, answers: list[bytes | None], script: list[Any]) -> Iterator[Held]:
    if protocol == "http":
        server = ByteServer(answers)
        yield Held(server.url, server.arrived, server.client_closed)
        server.close()
        return
    triton = ScriptedTriton(script)
    with running(triton) as (_, url):
        yield Held(url, triton.arrived, triton.cancelled)


@contextlib.contextmanager
def crowd(protocol: str, num_at_once: int) -> Iterator[str]:
    """The URL of a server that answers as soon as so many requests wait for it."""
    if protocol == "http":
        with CrowdServer(num_at_once) as server:
            yield server.url
    else:
        with running(CrowdTriton(num_at_once), num_at_once) as (_, url):
            yield url


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run an event loop to its end. Nothing may be left in it, and nothing may be complained of."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        await main
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            # Those that have been cancelled end now; one that waits for anything stays.
            await asyncio.wait(left, timeout=5)
        assert [task for task in left if not task.done()] == []

    asyncio.run(watched())
    gc.collect()
    assert complaints == []


async def happens(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_cancelled_task_cancels_its_request(silent: Held, call: Callable[[AsyncClient], Awaitable[Any]]):
    async def main() -> None:
        async with AsyncClient(silent.url) as client:
            task = asyncio.ensure_future(call(client))
            await happens(silent.arrived)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await happens(silent.left)

    run(main())


def test_a_task_cancelled_within_a_stream_cancels_its_request(halting: Held):
    async def main() -> None:
        async with AsyncClient(halting.url) as client:
            first = asyncio.Event()

            async def read() -> None:
                async for _ in client.stream("x"):
                    first.set()

            task = asyncio.create_task(read())
            await asyncio.wait_for(first.wait(), WAIT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await happens(halting.left)

    run(main())


@pytest.mark.parametrize("num_turns", range(6))
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_task_may_be_cancelled_at_any_turn_of_the_loop(
    protocol: str, call: Callable[[AsyncClient], Awaitable[Any]], num_turns: int
):
    async def main(url: str) -> None:
        async with AsyncClient(url) as client:
            task = asyncio.ensure_future(call(client))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await call(client) == ANSWER

    with crowd(protocol, 1) as url:
        run(main(url))


@pytest.mark.parametrize("how", ["close", "with", "drop", "drop in a thread", "break", "client", "wait_for"])
def test_leaving_a_stream_early_cancels_it(halting: Held, how: str):
    async def main() -> None:
        async with AsyncClient(halting.url) as client:
            stream = client.stream("x")
            await stream.__anext__()
            if how == "close":
                await stream.close()
            elif how == "with":
                async with stream:
                    pass
            elif how == "drop":
                del stream
            elif how == "drop in a thread":
                box = [stream]
                del stream
                await asyncio.to_thread(box.clear)
            elif how == "client":
                await client.close()
            elif how == "wait_for":
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(stream.__anext__(), 0.01)
            await happens(halting.left)

    async def leave_loop() -> None:
        async with AsyncClient(halting.url) as client:
            async for _ in client.stream("x"):
                break
            await happens(halting.left)

    run(leave_loop() if how == "break" else main())


def test_another_task_can_close_a_stream_that_waits(halting: Held):
    async def main() -> None:
        async with AsyncClient(halting.url) as client:
            stream = client.stream("x")
            await stream.__anext__()
            rest = asyncio.create_task(stream.collect())
            await asyncio.sleep(0)
            await stream.close()
            with pytest.raises(Cancelled):
                await rest
            assert [chunk async for chunk in stream] == []

    run(main())


def test_a_task_that_is_cancelled_while_its_stream_is_closed_stays_cancelled(halting: Held):
    async def main() -> None:
        async with AsyncClient(halting.url) as client:
            stream = client.stream("x")
            await stream.__anext__()
            rest = asyncio.create_task(stream.collect())
            await asyncio.sleep(0)
            await stream.close()
            rest.cancel()
            with pytest.raises(expected):
                await rest

    # Python 3.10 cannot tell one from the other.
    expected = asyncio.CancelledError if sys.version_info >= (3, 11) else (asyncio.CancelledError, Cancelled)
    run(main())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_closing_the_client_fails_the_calls_that_wait(
    silent: Held, call: Callable[[AsyncClient], Awaitable[Any]]
):
    async def main() -> None:
        client = AsyncClient(silent.url, max_connections=1)
        waiting = [asyncio.ensure_future(call(client)) for _ in range(3)]
        await happens(silent.arrived)
        await client.close()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert type(error) in (Cancelled, ConnectionFailed)
        with pytest.raises(ConnectionFailed, match="closed"):
            await call(client)

    run(main())


@pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])
def test_hundreds_of_requests_are_under_way_at_once(protocol: str, streaming: bool):
    async def main(url: str) -> None:
        async with AsyncClient(url, timeout=120) as client:
            calls = [
                client.stream("x").collect() if streaming else client.generate("x")
                for _ in range(num_at_once)
            ]
            assert await asyncio.gather(*calls) == [ANSWER] * num_at_once

    num_at_once = 200
    with crowd(protocol, num_at_once) as url:
        run(main(url))


def test_no_more_connections_than_allowed():
    async def main(url: str) -> None:
        async with AsyncClient(url, max_connections=3) as client:
            calls = [CALLS["stream" if number % 2 else "generate"](client) for number in range(30)]
            assert await asyncio.gather(*calls) == [ANSWER] * 30

    with CrowdServer(3) as server:
        run(main(server.url))
        assert server.num_connections == 3


def test_waiting_for_a_connection_counts_for_the_timeout():
    async def main() -> None:
        async with AsyncClient(server.url, max_connections=1) as client:
            first = asyncio.create_task(client.generate("x"))
            await happens(server.arrived)
            with pytest.raises(Timeout):
                await client.generate("x", timeout=0.2)
            with pytest.raises(Timeout):
                await client.stream("x", timeout=0.2).collect()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first

    server = ByteServer([HOLD])
    run(main())
    server.close()


@pytest.mark.parametrize("num", [0, -1])
def test_a_client_needs_a_connection(num: int):
    with pytest.raises(InvalidArgument, match="max_connections"):
        AsyncClient("localhost", max_connections=num)


def test_a_stream_sends_nothing_before_it_is_read(protocol: str):
    async def main(url: str) -> None:
        async with AsyncClient(url) as client:
            never_read = client.stream("x")
            closed = client.stream("x")
            await closed.close()
            assert [chunk async for chunk in closed] == []
            # Alone it would wait for a second request, of a server that wants two.
            assert await asyncio.gather(client.generate("x"), client.stream("x").collect()) == [ANSWER] * 2
            del never_read

    with crowd(protocol, 2) as url:
        run(main(url))


def test_what_cannot_be_sent_is_refused_before_the_first_chunk():
    async def main() -> None:
        async with AsyncClient("localhost:1") as client:
            for wrong in ({"timeout": 0}, {"input_ids": [1]}, {"top_p": float("nan")}):
                with pytest.raises(InvalidArgument):
                    client.stream("x", **wrong)  # type: ignore[arg-type]

    run(main())


def test_each_event_loop_needs_a_client_of_its_own(protocol: str):
    async def ask() -> None:
        assert await client.generate("x") == ANSWER

    async def ask_again() -> None:
        for call in CALLS.values():
            with pytest.raises(InvalidArgument, match="event loop"):
                await call(client)

    first = asyncio.new_event_loop()
    with crowd(protocol, 1) as url, contextlib.closing(first):
        client = AsyncClient(url)
        first.run_until_complete(ask())
        run(ask_again())
        first.run_until_complete(client.close())


def test_a_stream_that_outlives_its_loop_goes_in_silence(halting: Held):
    kept: list[Any] = []

    async def main() -> None:
        async with AsyncClient(halting.url) as client:
            kept.append(client.stream("x"))
            await kept[0].__anext__()

    async def leave_open() -> None:
        client = AsyncClient(halting.url)
        kept.append(client.stream("x"))

    run(main())
    run(leave_open())
    kept.clear()
    gc.collect()
