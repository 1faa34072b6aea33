"""The server's URL in all the forms that it may take."""

from __future__ import annotations

from typing import Any

import pytest
from manylora_client import InvalidArgument
from manylora_client.address import read_address


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        ("localhost", None, ("http", False, "localhost", 8000, "")),
        ("localhost", "grpc", ("grpc", False, "localhost", 8001, "")),
        ("localhost:9", "grpc", ("grpc", False, "localhost", 9, "")),
        ("http://h:9", None, ("http", False, "h", 9, "")),
        ("https://h/gate/", "http", ("http", True, "h", 443, "/gate")),
        ("h:9/gate", None, ("http", False, "h", 9, "/gate")),
        ("grpc://h:9/", None, ("grpc", False, "h", 9, "")),
        ("grpcs://h", "grpc", ("grpc", True, "h", 443, "")),
        ("127.0.0.1:9", None, ("http", False, "127.0.0.1", 9, "")),
        ("[::1]:9", None, ("http", False, "::1", 9, "")),
    ],
)
def test_urls(url: str, protocol: Any, expected: tuple[Any, ...]):
    found = read_address(url, protocol)
    assert (found.protocol, found.is_encrypted, found.host, found.port, found.path) == expected


@pytest.mark.parametrize(
    ("url", "protocol", "words"),
    [
        ("ftp://localhost", None, "ftp"),
        ("grpc://localhost", "http", "contradict"),
        ("https://localhost", "grpc", "contradict"),
        ("localhost", "grpcs2", "grpcs2"),
        ("", None, "host"),
        ("http://", None, "host"),
        ("localhost:port", None, "port"),
        ("localhost:70000", None, "70000|range"),
        ("grpc://localhost/path", None, "path"),
        ("http://localhost/a b", None, "percent"),
        ("http://localhost/é", None, "percent"),
        ("a..b:80", None, "no host"),
        ("http://" + "a" * 64, None, "no host"),
        ("http://me:secret@localhost", None, "headers"),
        ("grpc://me@localhost", None, "headers"),
        ("http://localhost/?key=1", None, "alone"),
        ("http://localhost/#x", None, "alone"),
    ],
)
def test_urls_that_cannot_be_understood(url: str, protocol, words: str):
    with pytest.raises(InvalidArgument, match=words):
        read_address(url, protocol)
