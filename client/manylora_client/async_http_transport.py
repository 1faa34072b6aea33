"""AsyncClient's requests over HTTP: `/infer` for whole answers, `/generate_stream` for streams."""

from __future__ import annotations

import asyncio
import contextlib
import io
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiohttp
from yarl import URL

from manylora_client import http_wire
from manylora_client.address import Address
from manylora_client.errors import ConnectionFailed, InvalidArgument, ManyloraClientError, from_connection
from manylora_client.request import Request
from manylora_client.transport import Deadline
from manylora_client.types import Chunk


class AsyncHttpTransport:
    """An AsyncTransport over HTTP: one session of aiohttp."""

    def __init__(
        self,
        address: Address,
        tls: ssl.SSLContext | None,
        headers: Mapping[str, str],
        max_connections: int | None,
    ) -> None:
        self._origin = Origin(address)
        # aiohttp would ask for compressed answers.
        self._headers = {"Accept-Encoding": "identity", **headers}
        encryption: dict[str, Any] = {} if tls is None else {"ssl": tls}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=max_connections or 0, **encryption),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def infer(self, model: str, request: Request, deadline: Deadline) -> Chunk:
        """See AsyncTransport."""
        call = http_wire.infer_call(model, request)
        with self._origin.mapped_errors():
            async with await self._send(call, deadline) as answer:
                content = await answer.read()
        return http_wire.infer_reply(answer.status, answer.headers.get(http_wire.HEADER_LENGTH, ""), content)

    def stream(self, model: str, request: Request, deadline: Deadline) -> AsyncHttpReplies:
        """See AsyncTransport."""
        sending = asyncio.create_task(self._send(http_wire.stream_call(model, request), deadline))
        return AsyncHttpReplies(sending, self._origin)

    async def is_ready(self, models: Sequence[str], deadline: Deadline) -> bool:
        """See AsyncTransport."""
        for call in http_wire.ready_calls(models):
            with self._origin.mapped_errors():
                async with await self._send(call, deadline) as answer:
                    await answer.read()
            if answer.status != 200:
                return False
        return True

    async def close(self) -> None:
        """See AsyncTransport."""
        await self._session.close()

    async def _send(self, call: http_wire.Call, deadline: Deadline) -> aiohttp.ClientResponse:
        if self._session.closed:
            raise ConnectionFailed("the client is closed")
        return await self._session.request(
            call.method,
            self._origin.url(call.path),
            # Bytes would be written in one piece, which blocks the event loop if there are many.
            data=io.BytesIO(call.body) if call.body else None,
            headers={**self._headers, **call.headers},
            allow_redirects=False,
            # Ends also the reading of the body.
            timeout=aiohttp.ClientTimeout(total=deadline.remaining_s()),
        )


class AsyncHttpReplies:
    """The replies of one `/generate_stream`."""

    def __init__(self, sending: asyncio.Task[aiohttp.ClientResponse], origin: Origin) -> None:
        self._sending = sending
        self._origin = origin
        self._answer: aiohttp.ClientResponse | None = None
        self._replies = http_wire.EventReplies()

    async def __anext__(self) -> Chunk:
        with self._origin.mapped_errors():
            if self._answer is None:
                self._answer = await self._begin()
            while (chunk := self._replies.try_next()) is None:
                part = await self._answer.content.readany()
                if not part:
                    self._replies.end()
                    raise StopAsyncIteration
                self._replies.feed(part)
            return chunk

    def close(self) -> None:
        """See AsyncReplies."""
        self._sending.cancel()
        if self._answer is not None:
            # Closes the connection, unless it has been given back at the end of the answer.
            self._answer.close()

    async def _begin(self) -> aiohttp.ClientResponse:
        answer = await self._sending
        kind = answer.headers.get("Content-Type", "")
        if not http_wire.is_event_stream(kind):
            raise http_wire.stream_error(answer.status, kind, await answer.read())
        return answer


class Origin:
    """A server's address, which its errors name."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._scheme = "https" if address.is_encrypted else "http"

    def url(self, path: str) -> URL:
        """Where `path` of Triton's own lies, percent-encoded as it is."""
        return URL.build(
            scheme=self._scheme,
            host=self._address.host,
            port=self._address.port,
            path=self._address.path + path,
            encoded=True,
        )

    @contextlib.contextmanager
    def mapped_errors(self) -> Iterator[None]:
        """Turn what aiohttp raises into the client's errors."""
        try:
            yield
        except ManyloraClientError:
            # One of them is a ValueError too.
            raise
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise from_connection(error, f"{self._address.host}:{self._address.port}") from error
        except ValueError as error:
            # What it says of a header that cannot be sent.
            raise InvalidArgument(f"the request cannot be sent: {error}") from error
