"""AsyncClient against the real server: many requests of one event loop, cancellation."""

from __future__ import annotations

import asyncio

import pytest
from manylora.serve.background import RunningServer
from manylora_client import AsyncClient, Completion

from bench.campaigns.harness import DONE_S, PROMPTS, SYNTHETIC, TRAINED, connect, status_of, wait_idle


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _connect(server: RunningServer, protocol: str) -> AsyncClient:
    return AsyncClient(server.http if protocol == "http" else server.grpc, protocol, timeout=DONE_S)  # type: ignore[arg-type]


def test_requests_of_many_adapters_at_once_are_answered_as_one_by_one(server: RunningServer, protocol: str):
    names = ["", *SYNTHETIC, *TRAINED]

    async def ask_all() -> list[Completion]:
        async with _connect(server, protocol) as client:
            calls = []
            for name in names:
                asked = {"adapter_id": name, "max_tokens": 4}
                calls += [
                    client.generate(PROMPTS[1], **asked),
                    client.stream(PROMPTS[1], **asked).collect(),
                    client.chat(PROMPTS[1], **asked),
                    client.chat(PROMPTS[1], stream=True, **asked).collect(),
                ]
            return await asyncio.gather(*calls)

    found = asyncio.run(ask_all())
    assert found[::4] == found[1::4]
    assert found[2::4] == found[3::4]
    with connect(server, protocol) as client:
        for number, name in enumerate(names):
            asked = {"adapter_id": name, "max_tokens": 4}
            assert client.generate(PROMPTS[1], **asked) == found[4 * number]
            assert client.chat(PROMPTS[1], **asked) == found[4 * number + 2]


def test_cancelled_streams_free_their_sequences(server: RunningServer, protocol: str):
    async def read(client: AsyncClient, begun: asyncio.Queue[None]) -> None:
        async for _ in client.stream(PROMPTS[0], adapter_id=SYNTHETIC[0], max_tokens=4000, ignore_eos=True):
            begun.put_nowait(None)

    async def begin_and_cancel(num_streams: int) -> None:
        async with _connect(server, protocol) as client:
            queues = [asyncio.Queue[None]() for _ in range(num_streams)]
            tasks = [asyncio.create_task(read(client, begun)) for begun in queues]
            for begun in queues:
                await asyncio.wait_for(begun.get(), DONE_S)
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, asyncio.CancelledError)
            # Cancelled, and not ended by the client's close: the loop and its connections go on.
            status = await asyncio.to_thread(wait_idle, server)
            assert status.gauges["running"] == 0
            assert status.counters["cancelled"] == before + num_streams
            assert (await client.generate(PROMPTS[0], max_tokens=2)).num_output_tokens == 2

    before = wait_idle(server).counters["cancelled"]
    asyncio.run(begin_and_cancel(8))
    assert wait_idle(server).check_errors == []


def test_a_cancelled_call_frees_its_sequence(server: RunningServer):
    """Over gRPC: Triton does not tell of an HTTP client that leaves before the answer."""

    async def begin_and_cancel() -> None:
        async with _connect(server, "grpc") as client:
            task = asyncio.create_task(client.generate(PROMPTS[0], max_tokens=4000, ignore_eos=True))
            while (await asyncio.to_thread(status_of, server)).gauges["running"] == 0:
                assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            status = await asyncio.to_thread(wait_idle, server)
            assert status.counters["cancelled"] == before + 1

    before = wait_idle(server).counters["cancelled"]
    asyncio.run(begin_and_cancel())


def test_leaving_the_loop_frees_the_sequence(server: RunningServer, protocol: str):
    async def leave() -> None:
        async with _connect(server, protocol) as client:
            async for _ in client.stream(PROMPTS[0], max_tokens=4000, ignore_eos=True):
                break
            status = await asyncio.to_thread(wait_idle, server)
            assert status.counters["cancelled"] == before + 1

    before = wait_idle(server).counters["cancelled"]
    asyncio.run(leave())
