"""Both clients, for the tests that hold for either."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from manylora_client import Client

from .blocking import BlockingClient


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """What is there before these tests is not searched for garbage after each of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes a Client, or an AsyncClient that looks like one."""
    opened: list[Client | BlockingClient] = []

    def make(*args: Any, **settings: Any) -> Client | BlockingClient:
        opened.append((Client if request.param == "Client" else BlockingClient)(*args, **settings))
        return opened[-1]

    yield make
    blocking = [client for client in opened if isinstance(client, BlockingClient)]
    for client in opened:
        client.end() if isinstance(client, BlockingClient) else client.close()
    if blocking:
        gc.collect()
    for client in blocking:
        client.check()
