"""An HTTP server that says exactly what a test tells it to, at the level of bytes."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import threading
from typing import IO, Any

from manylora_client import Completion

FIELDS = {
    "text_output": "é!",
    "output_ids": [5, 6],
    "finish_reason": "stop",
    "num_input_tokens": 3,
    "num_output_tokens": 2,
    "adapter_version": "v1",
    "logprobs": "",
}
ANSWER = Completion(
    text="é!",
    token_ids=[5, 6],
    finish_reason="stop",
    num_input_tokens=3,
    num_output_tokens=2,
    adapter_version="v1",
)


def plain(body: str, status: str = "200 OK", kind: str = "application/json") -> bytes:
    data = body.encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def events(*bodies: str, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = [f"data: {body}\n\n".encode() for body in bodies]
    return head.encode() + b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"


def infer_answer(**changes: object) -> bytes:
    fields = {**FIELDS, **changes}
    outputs = []
    for name, value in fields.items():
        data = value if isinstance(value, list) else [value]
        kind = "BYTES" if isinstance(data[0], str) else "INT32"
        outputs.append({"name": name, "datatype": kind, "shape": [1, len(data)], "data": data})
    return plain(json.dumps({"model_name": "llm", "model_version": "1", "outputs": outputs}))


def event(**changes: object) -> str:
    return json.dumps({**FIELDS, **changes})


HOLD = None
"""As an answer: say nothing and wait until the client closes the connection."""


class ByteServer:
    """Answers the requests of each connection, in order, with the bytes given, then closes the connection."""

    def __init__(self, *connections: list[bytes | None]) -> None:
        self.requests: list[tuple[int, bytes]] = []
        """Number of the connection, head and body."""
        self.arrived = threading.Event()
        """A request has come."""
        self.client_closed = threading.Event()
        """The client has closed a connection that the server had not."""
        self.closed_first = threading.Event()
        """The server has closed its first connection."""
        self._connections = connections
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(timeout=30)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        for number, answers in enumerate(self._connections):
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rb") as received:
                for answer in answers:
                    self._exchange(number, answer, connection, received)
            self.closed_first.set()

    def _exchange(
        self, number: int, answer: bytes | None, connection: socket.socket, received: IO[bytes]
    ) -> None:
        try:
            self.requests.append((number, self._read_request(received)))
            self.arrived.set()
            if answer is not HOLD:
                connection.sendall(answer)
            elif received.read(1) == b"":
                self.client_closed.set()
        except ConnectionResetError:
            # How a close looks when the client left bytes unread.
            self.client_closed.set()

    @staticmethod
    def _read_request(received: IO[bytes]) -> bytes:
        head = b""
        length = 0
        while line := received.readline():
            head += line
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
            if line == b"\r\n":
                return head + received.read(length)
        return head


class CrowdServer:
    """Holds each request until `num_at_once` are there, then answers them all, and so on."""

    def __init__(self, num_at_once: int, tls: ssl.SSLContext | None = None) -> None:
        self.num_connections = 0
        """Connections made so far."""
        self._gate = threading.Barrier(num_at_once, timeout=60)
        self._lock = threading.Lock()
        crowd = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                with crowd._lock:
                    crowd.num_connections += 1

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                crowd._gate.wait()
                is_stream = self.path.endswith("stream")
                self.wfile.write(events(event()) if is_stream else infer_answer())

            def log_message(self, *message: object) -> None:
                """Nothing to the terminal."""

        self._server = _QueueingServer(("127.0.0.1", 0), Handler)
        self._server.tls = tls
        self.url = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def __enter__(self) -> CrowdServer:
        return self

    def __exit__(self, *raised: object) -> None:
        self._gate.abort()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _QueueingServer(http.server.ThreadingHTTPServer):
    request_queue_size = 512
    tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:
            # The handshake belongs to the handler's thread.
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing to the terminal: clients that leave are part of the tests."""
