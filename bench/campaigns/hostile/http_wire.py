"""Sends a case over HTTP and takes in all that comes back."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import math
import socket
import struct
from typing import Any, cast

import numpy as np

from .case import Case, HttpBytes, HttpCall, Outcome, Reply

_NUMPY = {"INT32": "<i4", "BYTES": ""}


class _Received(io.BufferedReader):
    """What a connection receives, for several answers one after the other."""

    def close(self) -> None:
        """Leave the rest to the next answer; http.client closes at the end of each."""


class _Socket:
    """As much of a socket as http.client reads an answer from."""

    def __init__(self, connection: socket.socket) -> None:
        self._received = _Received(socket.SocketIO(connection, "r"))

    def makefile(self, mode: str) -> _Received:
        return self._received

    def answer(self, method: str) -> http.client.HTTPResponse:
        found = http.client.HTTPResponse(cast(socket.socket, self), method=method)
        found.begin()
        return found


def send(address: str, case: Case, timeout_s: float) -> Outcome:
    """Send a case on a connection of its own.

    Args:
        address: host:port.
        timeout_s: longest wait for anything more to come.
    """
    host, _, port = address.rpartition(":")
    outcome = Outcome()
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        # Short answers after short requests.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if isinstance(case.wire, HttpBytes):
                _send_bytes(connection, case.wire.sent)
                outcome.end = "closed"
            else:
                assert isinstance(case.wire, HttpCall)
                _send_call(connection, case.wire, case.cancel_after, outcome)
        except TimeoutError:
            outcome.end = "timed out"
        except (OSError, http.client.HTTPException) as error:
            # The server may close before it has taken all of what it refuses.
            outcome.end = "closed"
            if outcome.replies:
                outcome.fault = f"behind the answer: {error!r}"
    return outcome


def _send_bytes(connection: socket.socket, sent: bytes) -> None:
    """Send bytes that may be no request, then nothing more; wait until the server ends the connection."""
    connection.sendall(sent)
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 16):
        pass


def _send_call(connection: socket.socket, call: HttpCall, cancel_after: int | None, outcome: Outcome) -> None:
    headers = {"Host": "localhost", "Content-Length": str(len(call.body)), **call.headers}
    head = f"{call.method} {call.path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    connection.sendall(head.encode("latin-1") + b"\r\n" + call.body)
    if cancel_after == 0:
        outcome.end = "cancelled"
        return
    received = _Socket(connection)
    answer = received.answer(call.method)
    status = str(answer.status)
    if answer.getheader("Content-Type", "").startswith("text/event-stream"):
        if not _read_events(answer, status, cancel_after, outcome):
            return
    else:
        body = answer.read()
        if answer.getheader("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        outcome.add(
            "", _read(body, status, answer.getheader("Inference-Header-Content-Length")), is_final=True
        )
    if not answer.will_close:
        _check_connection(connection, received)


def _read_events(
    answer: http.client.HTTPResponse, status: str, cancel_after: int | None, outcome: Outcome
) -> bool:
    """Take in server-sent events. False: the client has gone away."""
    lines: list[bytes] = []
    for line in answer:
        if line.strip():
            lines.append(line)
            continue
        event = b"".join(lines).removeprefix(b"data: ")
        lines = []
        outcome.add("", _read(event, status, None), is_final=False)
        if cancel_after is not None and len(outcome.replies[""]) >= cancel_after:
            outcome.end = "cancelled"
            return False
    if lines:
        outcome.fault = f"half an event: {b''.join(lines)[:200]!r}"
    outcome.add("", None, is_final=True)
    return True


def _check_connection(connection: socket.socket, received: _Socket) -> None:
    """Ask a second thing on the same connection: whatever stood behind the first answer would spoil it."""
    connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    second = received.answer("GET")
    if second.status != 200 or second.read():
        raise http.client.HTTPException(f"the next answer has status {second.status}")


def _read(body: bytes, status: str, header_length: str | None) -> Reply:
    """An answer of any of the three endpoints, or an error."""
    head = body if header_length is None else body[: int(header_length)]
    try:
        # Triton's refusals quote what was sent as it was.
        found = json.loads(head.decode(errors="replace")) if head else {}
    except ValueError:
        return Reply(error=f"no JSON: {head[:200]!r}", status=status)
    if not isinstance(found, dict):
        # A list of models, from another endpoint.
        return Reply(outputs={"": _plain(found)}, status=status)
    if "error" in found or status != "200":
        return Reply(error=str(found.get("error", "")), status=status)
    if "outputs" in found:
        data = body[len(head) :]
        return Reply(outputs=_tensors(found["outputs"], data), status=status)
    return Reply(outputs={name: _plain(value) for name, value in found.items()}, status=status)


def _tensors(entries: list[dict[str, Any]], data: bytes) -> dict[str, tuple[str, list[int], list[Any]]]:
    found = {}
    for entry in entries:
        datatype, shape = entry["datatype"], entry["shape"]
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is None:
            flat = [v.encode() if isinstance(v, str) else v for v in entry["data"]]
        else:
            flat, data = unpack(datatype, data[:size]), data[size:]
        if len(flat) != math.prod(shape):
            raise http.client.HTTPException(f"{entry['name']} has {len(flat)} values for shape {shape}")
        found[entry["name"]] = (datatype, shape, flat)
    if data:
        raise http.client.HTTPException(f"{len(data)} bytes belong to no output")
    return found


def _plain(value: Any) -> tuple[str, list[int], list[Any]]:
    """An output of `/generate`, which drops shapes."""
    flat = value if isinstance(value, list) else [value]
    if all(isinstance(each, str) for each in flat):
        return "BYTES", [], [each.encode(errors="replace") for each in flat]
    return "INT32", [], flat


def unpack(datatype: str, data: bytes) -> list[Any]:
    """The values of an output in Triton's binary form."""
    if datatype != "BYTES":
        return list(np.frombuffer(data, _NUMPY[datatype]).tolist())
    found = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found
