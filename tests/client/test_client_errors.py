"""Every lower error becomes one of the client's, and the server's code decides which."""

from __future__ import annotations

import builtins
import http.client
import ssl

import grpc
import manylora_client
import pytest
from manylora.errors import BY_CODE
from manylora_client import errors
from manylora_client.errors import (
    Cancelled,
    ConnectionFailed,
    Internal,
    InvalidArgument,
    ManyloraClientError,
    NotFound,
    Timeout,
    Unavailable,
    Unsupported,
)


def _subclasses(base: type) -> list[type]:
    return [base, *(deeper for cls in base.__subclasses__() for deeper in _subclasses(cls))]


def _made(cls: type) -> BaseException:
    if issubclass(cls, http.client.IncompleteRead):
        return cls(b"half")
    if issubclass(cls, UnicodeError):
        return cls("utf-8", b"x", 0, 1, "bad")
    return cls("it broke")


HTTP_ERRORS = _subclasses(http.client.HTTPException)
OS_ERRORS = [cls for cls in vars(builtins).values() if isinstance(cls, type) and issubclass(cls, OSError)]


def test_the_client_knows_exactly_the_servers_codes():
    assert set(errors.BY_CODE) == set(BY_CODE)


def test_every_class_of_the_tree_is_exported():
    for cls in _subclasses(ManyloraClientError):
        assert getattr(manylora_client, cls.__name__) is cls


@pytest.mark.parametrize("code", sorted(errors.BY_CODE))
@pytest.mark.parametrize(
    "wrapped",
    ["[{}] adapter 'x' is unknown", "in ensemble 'e', [{}] adapter 'x' is unknown"],
    ids=["at the start", "after Triton's words"],
)
def test_the_code_in_the_message_decides(code: str, wrapped: str):
    error = errors.from_message(wrapped.format(code), ConnectionFailed)
    assert type(error) is errors.BY_CODE[code]
    assert error.code == code
    assert error.message == str(error) == "adapter 'x' is unknown"


def test_the_first_code_wins_and_the_whole_message_is_kept():
    error = errors.from_message("[INVALID_ARG] parameter stop: got '[NOT_FOUND]',\nallowed is text", Internal)
    assert type(error) is InvalidArgument
    assert error.message == "parameter stop: got '[NOT_FOUND]',\nallowed is text"


@pytest.mark.parametrize("text", ["", "[BANANA] odd", "[request id: 7] wrong shape", "INVALID_ARG"])
def test_a_message_without_a_code_takes_the_fallback(text: str):
    assert type(errors.from_message(text, Internal)) is Internal


@pytest.mark.parametrize("status", range(300, 600))
def test_every_http_status_is_mapped(status: int):
    error = errors.from_http_status(status, "")
    assert isinstance(error, ManyloraClientError)
    assert str(status) in error.message


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (400, "unexpected shape for input", InvalidArgument),
        (403, "This API is restricted, expecting header 'x'", Unsupported),
        (
            400,
            "Failed to increase the shared memory pool size for key 'manylora_0_1' to 9 bytes.",
            InvalidArgument,
        ),
        (404, "Request for unknown model: 'x' is not found", NotFound),
        (500, "oops", Internal),
        (501, "decoupled", Unsupported),
        (503, "busy", Unavailable),
        (504, "gateway", Unavailable),
        (400, "Stub process 'llm_0_0' is not healthy.", Unavailable),
        (500, "Stub process 'llm_0_0' is not healthy.", Unavailable),
        (400, "[CANCELLED] the client went away", Cancelled),
        (400, "[NOT_FOUND] adapter 'x'", NotFound),
    ],
)
def test_http_errors(status: int, text: str, expected: type[ManyloraClientError]):
    assert type(errors.from_http_status(status, text)) is expected


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_grpc_status_is_mapped_on_purpose(code: grpc.StatusCode):
    assert code.name in errors._BY_GRPC_CODE
    assert isinstance(errors.from_grpc(code.name, ""), ManyloraClientError)


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        ("UNAVAILABLE", "[UNAVAILABLE] the queue is full", Unavailable),
        ("UNAVAILABLE", "failed to connect to all addresses", ConnectionFailed),
        ("UNAVAILABLE", "Request for unknown model: 'llm' has no available versions", Unavailable),
        ("UNAVAILABLE", "Request for unknown model: 'llm' is not found", NotFound),
        ("UNKNOWN", "Stream removed (Socket closed)", ConnectionFailed),
        ("INTERNAL", "Received RST_STREAM with error code 2", ConnectionFailed),
        ("INTERNAL", "[INTERNAL] request 7 failed", Internal),
        ("INTERNAL", "Stub process 'llm_0_0' is not healthy.", Unavailable),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Timeout),
        ("DEADLINE_EXCEEDED", "Stream removed (Deadline Exceeded)", Timeout),
        ("CANCELLED", "Channel closed!", Cancelled),
    ],
)
def test_grpc_errors(code: str, text: str, expected: type[ManyloraClientError]):
    assert type(errors.from_grpc(code, text)) is expected


@pytest.mark.parametrize("cls", [*HTTP_ERRORS, *OS_ERRORS, ssl.SSLError], ids=lambda cls: cls.__name__)
def test_every_socket_and_http_error_is_mapped(cls: type):
    lower = _made(cls)
    assert isinstance(lower, (OSError, http.client.HTTPException))
    error = errors.from_connection(lower, "host:1")
    assert type(error) is (Timeout if isinstance(lower, TimeoutError) else ConnectionFailed)
    assert "host:1" in error.message


@pytest.mark.parametrize(
    "text",
    [
        "Failed to increase the shared memory pool size for key 'manylora_0123456789ab_7' to 9 bytes. If you "
        "are running Triton inside docker, use '--shm-size' flag to control the shared memory region size.",
        "Failed to initialize Python stub: No such file 'manylora_0123456789ab_7'",
        "Unable to open shared memory region: '/dev/shm/x'",
    ],
    ids=["full", "stub", "region"],
)
def test_tritons_text_about_the_servers_memory_is_not_passed_on(text: str):
    for error in (errors.from_http_status(400, text), errors.from_grpc("INTERNAL", text)):
        assert type(error) is InvalidArgument
        assert "manylora_" not in error.message
        assert "shm" not in error.message


def test_a_protocol_that_is_closed_is_not_taken_for_a_broken_connection():
    text = "This protocol is restricted, expecting header 'triton-grpc-protocol-x'"
    error = errors.from_grpc("UNAVAILABLE", text)
    assert type(error) is Unsupported
    assert error.message == "the server does not open this interface to clients"
