"""The client: one object for one server, over HTTP or gRPC."""

from __future__ import annotations

import ssl
import threading
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, overload

from manylora_client.address import Address, ProtocolName, read_address
from manylora_client.errors import ConnectionFailed, InvalidArgument, ManyloraClientError
from manylora_client.request import build_request, chat_text
from manylora_client.stream import Stream
from manylora_client.transport import Deadline, Transport
from manylora_client.types import Completion, Messages, ParameterValue, TokenIds


class Client:
    """Ask a Manylora server for text.

        with Client("localhost:8000") as client:
            print(client.generate("The sea is", adapter_id="pirate", max_tokens=32).text)

    All methods may be called from several threads at once. A Stream is for one thread, except for its
    `close`. Nothing is retried: whether a request may be sent again after Unavailable or ConnectionFailed is
    the caller's to say.
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
        """Name the server. Nothing is sent yet.

        Args:
            url: `host`, `host:port`, or a URL with the scheme http, https, grpc or grpcs. The port defaults
                to 8000 for http, 8001 for grpc and 443 for the encrypted two. A path in an HTTP URL comes
                before Triton's own.
            protocol: `http` or `grpc`. None is the scheme's, or http.
            timeout: seconds that a call may take as a whole, up to a stream's last chunk. None is no bound.
            headers: sent with each request, such as a gateway's authorization.
            tls: settings for https. None is Python's default, which checks the certificate.
            model: name of the front end that gives whole answers.
            stream_model: name of the front end that streams.

        Raises:
            InvalidArgument: the URL cannot be understood, or contradicts `protocol`.
        """
        Deadline(timeout)
        self._timeout = timeout
        self._model = model
        self._stream_model = stream_model
        self._transport = _open_transport(read_address(url, protocol), headers or {}, tls)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._closed = False
        # Guards _streams and _closed.
        self._lock = threading.Lock()

    def generate(
        self,
        prompt: str | None = None,
        *,
        input_ids: TokenIds | None = None,
        adapter_id: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        timeout: float | None = None,
        **parameters: ParameterValue,
    ) -> Completion:
        """Continue a prompt and wait for the whole answer.

        Args:
            prompt: the prompt as text. Exactly one of `prompt` and `input_ids`.
            input_ids: the prompt as token ids.
            adapter_id: the adapter; empty is the base model.
            max_tokens: most tokens to generate.
            temperature: 0 is greedy.
            top_p: sample among the likeliest tokens whose probabilities reach this sum.
            top_k: sample among this many of the likeliest tokens; 0 is all.
            stop: text, or texts, before which the answer ends.
            seed: makes sampling repeatable.
            timeout: seconds for this call, in place of the client's.
            parameters: any other request parameter of the server; what is None is not sent, and the server's
                default holds.

        Raises:
            InvalidArgument, NotFound, Unsupported, Unavailable, Cancelled, Internal: as the server says.
            ConnectionFailed: the server cannot be reached or broke the connection.
            Timeout: the timeout passed.
        """
        named = _parameters(adapter_id, max_tokens, temperature, top_p, top_k, stop, seed)
        return self._generate(prompt, input_ids, {**named, **parameters}, timeout)

    def stream(
        self,
        prompt: str | None = None,
        *,
        input_ids: TokenIds | None = None,
        adapter_id: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        timeout: float | None = None,
        **parameters: ParameterValue,
    ) -> Stream:
        """Continue a prompt and return the answer's chunks as they come.

        The request is sent now; errors of the server come from the Stream. Closing the Stream early, dropping
        it (as a loop left with `break` does) or closing the client cancels the request. Over HTTP, Triton
        24.10 sees that only after the first reply.

        Args and Raises: as `generate`.
        """
        named = _parameters(adapter_id, max_tokens, temperature, top_p, top_k, stop, seed)
        return self._stream(prompt, input_ids, {**named, **parameters}, timeout)

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        adapter_id: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        timeout: float | None = None,
        **parameters: ParameterValue,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        adapter_id: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        timeout: float | None = None,
        **parameters: ParameterValue,
    ) -> Stream: ...

    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        adapter_id: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        timeout: float | None = None,
        **parameters: ParameterValue,
    ) -> Completion | Stream:
        """Answer a chat, put through the model's chat template.

        Args:
            messages: a user message, or the turns so far, each with `role` and `content`.
            stream: return the chunks as they come instead of the whole answer.

        Other Args and Raises: as `generate`.
        """
        named = _parameters(adapter_id, max_tokens, temperature, top_p, top_k, stop, seed)
        answer = self._stream if stream else self._generate
        return answer(chat_text(messages), None, {"chat": True, **named, **parameters}, timeout)

    def is_ready(self, timeout: float | None = 5.0) -> bool:
        """Whether the server and both front ends take requests. False also when the server cannot be reached.

        Args:
            timeout: seconds to wait for the answer.
        """
        if self._closed:
            return False
        try:
            return self._transport.is_ready([self._model, self._stream_model], Deadline(timeout))
        except InvalidArgument:
            raise
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

    def _generate(
        self,
        prompt: str | None,
        input_ids: TokenIds | None,
        parameters: Mapping[str, ParameterValue],
        timeout: float | None,
    ) -> Completion:
        request = build_request(prompt, input_ids, parameters)
        reply = self._open().infer(self._model, request, self._deadline(timeout))
        return Completion(
            text=reply.text,
            token_ids=reply.token_ids,
            finish_reason=reply.finish_reason,
            num_input_tokens=reply.num_input_tokens,
            num_output_tokens=reply.num_output_tokens,
            adapter_version=reply.adapter_version,
        )

    def _stream(
        self,
        prompt: str | None,
        input_ids: TokenIds | None,
        parameters: Mapping[str, ParameterValue],
        timeout: float | None,
    ) -> Stream:
        request = build_request(prompt, input_ids, parameters)
        stream = Stream(self._open().stream(self._stream_model, request, self._deadline(timeout)))
        with self._lock:
            if not self._closed:
                self._streams.add(stream)
                return stream
        stream.close()
        raise ConnectionFailed("the client is closed")

    def _open(self) -> Transport:
        if self._closed:
            raise ConnectionFailed("the client is closed")
        return self._transport

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self._timeout if timeout is None else timeout)


def _parameters(
    adapter_id: str,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    stop: str | list[str] | None,
    seed: int | None,
) -> dict[str, ParameterValue]:
    return {
        "adapter_id": adapter_id or None,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "stop": stop,
        "seed": seed,
    }


def _open_transport(address: Address, headers: Mapping[str, str], tls: ssl.SSLContext | None) -> Transport:
    # Each is imported only where it is used: gevent and grpc take long to load.
    if address.protocol == "http":
        from manylora_client.http_transport import HttpTransport

        context = (tls or ssl.create_default_context()) if address.is_encrypted else None
        return HttpTransport(address.host, address.port, path=address.path, tls=context, headers=headers)
    from manylora_client.grpc_transport import GrpcTransport

    return GrpcTransport(address.host, address.port, tls=address.is_encrypted, headers=headers)
