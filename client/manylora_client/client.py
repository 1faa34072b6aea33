"""The client: one object for one server, over HTTP or gRPC."""

from __future__ import annotations

import ssl
import threading
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, overload

from manylora_client.address import ProtocolName
from manylora_client.base_client import BaseClient
from manylora_client.completion import join
from manylora_client.errors import ConnectionFailed, ManyloraClientError
from manylora_client.request import Request
from manylora_client.stream import Stream
from manylora_client.transport import Deadline, Transport
from manylora_client.types import Completion, Messages, TokenIds

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from manylora_client.options import Options


class Client(BaseClient):
    """Ask a Manylora server for text.

        with Client("localhost:8000") as client:
            print(client.generate("The sea is", adapter_id="pirate", max_tokens=32).text)

    All methods may be called from several threads at once. A Stream is for one thread, except for its
    `close`. Nothing is retried: whether a request may be sent again after Unavailable or ConnectionFailed is
    for the caller to decide.
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
    ) -> None:
        super().__init__(
            url,
            protocol,
            timeout=timeout,
            headers=headers,
            tls=tls,
            model=model,
            stream_model=stream_model,
        )
        self._transport = self._open_transport()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        # Guards _streams and _closed.
        self._lock = threading.Lock()

    def generate(
        self,
        prompt: str | None = None,
        *,
        input_ids: TokenIds | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Continue a prompt and wait for the whole answer.

        Args:
            prompt: the prompt as text. Exactly one of `prompt` and `input_ids`.
            input_ids: the prompt as token ids.
            timeout: seconds for this call, in place of the client's.
            options: adapter_id, max_tokens, temperature and all others that Options names.

        Raises:
            InvalidArgument, NotFound, Unsupported, Unavailable, Cancelled, Internal: as the server says.
            ConnectionFailed: the server cannot be reached or broke the connection.
            Timeout: the timeout passed.
        """
        return self._generate(self._request(prompt, input_ids, options), timeout)

    def stream(
        self,
        prompt: str | None = None,
        *,
        input_ids: TokenIds | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Continue a prompt and return the answer's chunks as they come.

        The request is sent now; errors of the server come from the Stream. Closing the Stream early, dropping
        it (as a loop left with `break` does) or closing the client cancels the request. Over HTTP, Triton
        24.10 sees that only after the first reply.

        Args and Raises: as `generate`.
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
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Stream: ...

    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Completion | Stream:
        """Answer a chat, put through the model's chat template.

        Args:
            messages: a user message, or the turns so far, each with `role` and `content`.
            stream: return the chunks as they come instead of the whole answer.

        Other Args and Raises: as `generate`.
        """
        answer = self._stream if stream else self._generate
        return answer(self._chat_request(messages, options), timeout)

    def is_ready(self, timeout: float | None = 5.0) -> bool:
        """Whether the server and both front ends accept requests. False also when the server cannot be
        reached.

        Args:
            timeout: seconds to wait for the answer. None: no limit.
        """
        deadline = Deadline(timeout)
        try:
            return self._open().is_ready(self._models, deadline)
        except ManyloraClientError:
            return False

    def close(self) -> None:
        """Close all connections. Open Streams end; calls that other threads wait for may fail."""
        with self._lock:
            self._closed = True
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(self, request: Request, timeout: float | None) -> Completion:
        return join([self._open().infer(self._model, request, self._deadline(timeout))])

    def _stream(self, request: Request, timeout: float | None) -> Stream:
        stream = Stream(self._open().stream(self._stream_model, request, self._deadline(timeout)))
        with self._lock:
            if not self._closed:
                self._streams.add(stream)
                return stream
        # Closed since the request was sent.
        stream.close()
        raise ConnectionFailed("the client is closed")

    def _open(self) -> Transport:
        self._check_open()
        return self._transport

    def _open_transport(self) -> Transport:
        address = self._address
        # Each is imported only where it is used: gevent and grpc take long to load.
        if address.protocol == "http":
            from manylora_client.http_transport import HttpTransport

            return HttpTransport(
                address.host, address.port, path=address.path, tls=self._tls, headers=self._headers
            )
        from manylora_client.grpc_transport import GrpcTransport

        return GrpcTransport(address.host, address.port, tls=address.is_encrypted, headers=self._headers)
