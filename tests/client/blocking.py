"""AsyncClient behind Client's face, so that the same tests hold both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from manylora_client import AsyncClient, AsyncStream, Chunk, Completion

Result = TypeVar("Result")


class BlockingClient:
    """An AsyncClient on an event loop that runs in a thread of its own."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._client = AsyncClient(*args, **settings)
        self._complaints: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: self._complaints.append(context))
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def generate(self, *args: Any, **options: Any) -> Completion:
        return self.run(self._client.generate(*args, **options))

    def stream(self, *args: Any, **options: Any) -> BlockingStream:
        return BlockingStream(self, self._client.stream(*args, **options))

    def chat(self, *args: Any, stream: bool = False, **options: Any) -> Any:
        if stream:
            return BlockingStream(self, self._client.chat(*args, stream=True, **options))
        return self.run(self._client.chat(*args, **options))

    def is_ready(self, *args: Any, **options: Any) -> bool:
        return self.run(self._client.is_ready(*args, **options))

    def close(self) -> None:
        self.run(self._client.close())

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def end(self) -> None:
        """Close the client and the loop. No task may be left in it."""
        self.close()
        left = self.run(_other_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert left == []

    def check(self) -> None:
        """See that asyncio and its users had nothing to complain of. They often do so when garbage goes."""
        assert self._complaints == []

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class BlockingStream:
    """An AsyncStream that blocks."""

    def __init__(self, client: BlockingClient, stream: AsyncStream) -> None:
        self._client = client
        self._stream = stream

    def __iter__(self) -> BlockingStream:
        return self

    def __next__(self) -> Chunk:
        try:
            return self._client.run(self._stream.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def collect(self) -> Completion:
        return self._client.run(self._stream.collect())

    def close(self) -> None:
        self._client.run(self._stream.close())

    def __enter__(self) -> BlockingStream:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


async def _other_tasks() -> list[str]:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        # Those that have been cancelled end now; one that waits for anything stays.
        await asyncio.wait(others, timeout=5)
    return [repr(task) for task in others if not task.done()]
