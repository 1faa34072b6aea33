"""What Client and AsyncClient share: settings, and how arguments become a request."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING

from manylora_client.address import ProtocolName, read_address
from manylora_client.errors import ConnectionFailed, InvalidArgument
from manylora_client.headers import read_headers
from manylora_client.request import Request, build_request, chat_text
from manylora_client.transport import Deadline
from manylora_client.types import Messages, TokenIds

if TYPE_CHECKING:
    from manylora_client.options import Options


class BaseClient:
    """The settings of one server's client."""

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
            timeout: seconds that a call may take as a whole, up to a stream's last chunk. None: no limit.
            headers: sent with each request, such as a gateway's authorization.
            tls: settings for https. None is Python's default, which checks the certificate. For grpcs,
                gRPC's environment variable GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names other authorities.
            model: name of the front end that gives whole answers.
            stream_model: name of the front end that streams.

        Raises:
            InvalidArgument: the URL cannot be understood, or contradicts `protocol` or `tls`; a header cannot
                be sent.
        """
        Deadline(timeout)
        self._timeout = timeout
        self._model = model
        self._stream_model = stream_model
        self._address = read_address(url, protocol)
        self._headers = read_headers(headers or {}, self._address.protocol)
        uses_https = self._address.protocol == "http" and self._address.is_encrypted
        if tls is not None and not uses_https:
            raise InvalidArgument(f"url={url!r}: settings for TLS are given, but only https takes them")
        self._tls = (tls or ssl.create_default_context()) if uses_https else None
        self._closed = False
        self._models = (model, stream_model)

    def _request(self, prompt: str | None, input_ids: TokenIds | None, options: Options) -> Request:
        return build_request(prompt, input_ids, _parameters(options))

    def _chat_request(self, messages: Messages, options: Options) -> Request:
        return build_request(chat_text(messages), None, {"chat": True, **_parameters(options)})

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionFailed("the client is closed")

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self._timeout if timeout is None else timeout)


def _parameters(options: Options) -> dict[str, object]:
    # An empty name is the base model's, which is what the server takes a missing one for.
    return {**options, "adapter_id": options.get("adapter_id") or None}
