"""The server's address, read from its URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from manylora_client.errors import InvalidArgument

ProtocolName = Literal["http", "grpc"]

_PROTOCOLS: dict[str, ProtocolName] = {"http": "http", "https": "http", "grpc": "grpc", "grpcs": "grpc"}
# Triton's own ones; only gateways encrypt.
_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A server, and how to speak to it."""

    protocol: ProtocolName
    is_encrypted: bool
    host: str
    """A name, or an IPv4 or IPv6 address without brackets."""
    port: int
    path: str
    """Comes before Triton's own; empty for gRPC."""


def read_address(url: str, protocol: ProtocolName | None) -> Address:
    """Read a URL, with or without scheme and port.

    Args:
        protocol: None is the scheme's, or http where there is none.

    Raises:
        InvalidArgument: it cannot be understood, or contradicts `protocol`.
    """
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidArgument(f"url={url!r}: {error}") from error
    scheme = parts.scheme or protocol or "http"
    if scheme not in _PROTOCOLS:
        raise InvalidArgument(f"url={url!r}: the scheme is {scheme!r}; allowed are {', '.join(_PROTOCOLS)}")
    if protocol not in (None, _PROTOCOLS[scheme]):
        raise InvalidArgument(f"url={url!r} and protocol={protocol!r} contradict each other")
    protocol = _PROTOCOLS[scheme]
    if not host:
        raise InvalidArgument(f"url={url!r}: the host is missing; expected host:port")
    _check_rest(url, host, parts)
    if protocol == "grpc" and parts.path.strip("/"):
        raise InvalidArgument(f"url={url!r}: gRPC takes no path, found {parts.path!r}")
    return Address(
        protocol=protocol,
        is_encrypted=scheme in ("https", "grpcs"),
        host=host,
        port=port or _PORTS[scheme],
        path=parts.path.rstrip("/"),
    )


def _check_rest(url: str, host: str, parts: SplitResult) -> None:
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise InvalidArgument(f"url={url!r}: {host!r} is no host's name: {error}") from error
    if not re.fullmatch(r"[!-~]*", parts.path):
        raise InvalidArgument(f"url={url!r}: the path {parts.path!r} must be percent-encoded")
    # Dropped in silence, a password or a key would be missed only at the gateway.
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidArgument(
            f"url={url!r}: expected scheme, host, port and path alone; give credentials as headers"
        )
