"""The client for asyncio."""

from __future__ import annotations

import asyncio
import ssl
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from manylora_client.address import Address, ProtocolName
from manylora_client.async_stream import AsyncStream, is_task_cancelled
from manylora_client.base_client import BaseClient
from manylora_client.completion import join
from manylora_client.errors import Cancelled, InvalidArgument, ManyloraClientError
from manylora_client.request import Request
from manylora_client.transport import AsyncReplies, AsyncTransport, Deadline
from manylora_client.types import Completion, Messages, TokenIds

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from manylora_client.options import Options

Result = TypeVar("Result")


class AsyncClient(BaseClient):
    """Ask a Manylora server for text, from asyncio.

        async with AsyncClient("localhost:8000") as client:
            answers = await asyncio.gather(*(client.generate(prompt) for prompt in prompts))

    The twin of Client: the same methods, arguments and errors. It belongs to the event loop that first uses
    it; any number of that loop's tasks may share it. A task that is cancelled cancels its request on the
    server. Over HTTP, Triton 24.10 sees that on streams only, and after the first reply; there `deadline_ms`
    is the bound.
    """

    def __init__(
        self,
        url: str,
        protocol: ProtocolName | None = None,
        *,
        timeout: float | None = 300.0,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        model: str = "llm",
        stream_model: str = "llm_stream",
        max_connections: int | None = 512,
    ) -> None:
        """Name the server. Nothing is sent yet.

        Args:
            max_connections: most connections at once over HTTP, where each request in flight needs one;
                further ones wait for theirs, within their timeout. Each is an open file, of which a process
                may often have no more than 1024. None: no limit. gRPC needs one for all requests.

        Other Args and Raises: as Client.
        """
        super().__init__(
            url,
            protocol,
            timeout=timeout,
            headers=headers,
            tls=tls,
            model=model,
            stream_model=stream_model,
        )
        if max_connections is not None and max_connections < 1:
            raise InvalidArgument(f"max_connections={max_connections}: must be above 0, or None for no bound")
        self._open_transport = _transport_opener(self._address, self._headers, self._tls, max_connections)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport: AsyncTransport | None = None
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()

    async def generate(
        self,
        prompt: str | None = None,
        *,
        input_ids: TokenIds | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Continue a prompt and wait for the whole answer. Args and Raises: as `Client.generate`."""
        return await self._generate(self._request(prompt, input_ids, options), timeout)

    def stream(
        self,
        prompt: str | None = None,
        *,
        input_ids: TokenIds | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Continue a prompt and return the answer's chunks as they come.

            async for chunk in client.stream("Once upon a time"):
                print(chunk.text, end="")

        The request is sent, and its timeout begins, when the first chunk is asked for.

        Args and Raises: as `Client.generate`.
        """
        return self._stream(self._request(prompt, input_ids, options), timeout)

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream: ...

    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Coroutine[Any, Any, Completion] | AsyncStream:
        """Answer a chat, put through the model's chat template: `await` it, or iterate with `stream=True`.

        Args and Raises: as `Client.chat`.
        """
        request = self._chat_request(messages, options)
        return self._stream(request, timeout) if stream else self._generate(request, timeout)

    async def is_ready(self, timeout: float | None = 5.0) -> bool:
        """Whether the server and both front ends accept requests. As `Client.is_ready`."""
        deadline = Deadline(timeout)
        try:
            return await self._guard(self._open().is_ready(self._models, deadline))
        except ManyloraClientError:
            return False

    async def close(self) -> None:
        """Close all connections. Open AsyncStreams end; calls that other tasks wait for fail."""
        self._closed = True
        for stream in list(self._streams):
            await stream.close()
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _generate(self, request: Request, timeout: float | None) -> Completion:
        answer = self._open().infer(self._model, request, self._deadline(timeout))
        return join([await self._guard(answer)])

    def _stream(self, request: Request, timeout: float | None) -> AsyncStream:
        self._check_open()
        # An invalid timeout is refused now, not at the first chunk.
        self._deadline(timeout)

        def send() -> AsyncReplies:
            return self._open().stream(self._stream_model, request, self._deadline(timeout))

        stream = AsyncStream(send)
        self._streams.add(stream)
        return stream

    async def _guard(self, call: Awaitable[Result]) -> Result:
        try:
            return await call
        except asyncio.CancelledError as error:
            # Closing a transport cancels the calls inside it, not the tasks that await them.
            if self._closed and not is_task_cancelled():
                raise Cancelled("the client was closed before the answer came") from error
            raise

    def _open(self) -> AsyncTransport:
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._transport is None:
            self._transport, self._loop = self._open_transport(), loop
        if self._loop is not loop:
            raise InvalidArgument("this AsyncClient belongs to another event loop; each loop needs its own")
        return self._transport


def _transport_opener(
    address: Address, headers: Mapping[str, str], tls: ssl.SSLContext | None, max_connections: int | None
) -> Callable[[], AsyncTransport]:
    # Each is imported only where it is used, and not while the event loop runs: aiohttp, gevent and grpc take
    # long to load.
    if address.protocol == "http":
        from manylora_client.async_http_transport import AsyncHttpTransport

        return lambda: AsyncHttpTransport(address, tls, headers, max_connections)
    from manylora_client.async_grpc_transport import AsyncGrpcTransport

    return lambda: AsyncGrpcTransport(address, headers)
