"""Headers that a user wants sent with each request."""

from __future__ import annotations

import re
from collections.abc import Mapping

from manylora_client.address import ProtocolName
from manylora_client.errors import InvalidArgument

# HTTP: RFC 9110, sections 5.1 and 5.5. gRPC: PROTOCOL-HTTP2.md, Custom-Metadata; the client sends names in
# lower case.
_NAMES: dict[ProtocolName, str] = {
    "http": r"[!#$%&'*+.^_`|~0-9A-Za-z-]+",
    "grpc": r"[0-9A-Za-z_.-]+(?<!-bin)",
}
_VALUES: dict[ProtocolName, str] = {"http": r"[\t -~\x80-\xff]*", "grpc": r"[ -~]*"}


def read_headers(headers: Mapping[str, str], protocol: ProtocolName) -> dict[str, str]:
    """Check that headers can be sent.

    Raises:
        InvalidArgument: a name or a value that the protocol cannot carry. The message holds no value, since
            that may be a secret.
    """
    for name, value in headers.items():
        if not isinstance(name, str) or not re.fullmatch(_NAMES[protocol], name):
            raise InvalidArgument(f"header {name!r}: no name that {protocol} can send")
        if not isinstance(value, str) or not re.fullmatch(_VALUES[protocol], value):
            raise InvalidArgument(f"header {name!r}: its value is no text that {protocol} can send")
    return dict(headers)
