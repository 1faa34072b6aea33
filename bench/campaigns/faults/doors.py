"""What a client does through doors that should be closed, and with too much of what is open."""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from manylora.serve import limits, processes
from manylora.serve.background import RunningServer
from tritonclient.utils import InferenceServerException

from bench.campaigns.faults.anatomy import DONE_S, shared_memory_of, stub_of, tritonserver_of
from bench.campaigns.faults.load import MAX_TOKENS, Bed, Report

FEW_DESCRIPTORS = 256
NUM_IDLE = 500
HELD_TOKENS = 400
"""Of answers that last while connections are held."""
HUGE_BYTES = 1 << 30
MAX_LOG_BYTES = 2 * (33 << 20)
"""Of the log and the one before it, together."""
CLOSED_HTTP = (
    ("GET", "/v2/systemsharedmemory/status"),
    ("GET", "/v2/systemsharedmemory/region/x/status"),
    ("POST", "/v2/systemsharedmemory/region/x/register"),
    ("POST", "/v2/systemsharedmemory/unregister"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("POST", "/v2/cudasharedmemory/region/x/register"),
    ("POST", "/v2/cudasharedmemory/unregister"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/trace/setting"),
    ("POST", "/v2/models/llm/trace/setting"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/llm/load"),
    ("POST", "/v2/repository/models/llm/unload"),
)
CLOSED_GRPC: dict[str, tuple[object, ...]] = {
    "get_system_shared_memory_status": (),
    "register_system_shared_memory": ("x", "/x", 4),
    "unregister_system_shared_memory": (),
    "get_cuda_shared_memory_status": (),
    "register_cuda_shared_memory": ("x", b"AAAA", 0, 4),
    "unregister_cuda_shared_memory": (),
    "get_log_settings": (),
    "update_log_settings": ({"log_verbose_level": 1},),
    "get_trace_settings": (),
    "update_trace_settings": (),
    "get_model_repository_index": (),
    "load_model": ("llm",),
    "unload_model": ("llm",),
}


def ask_http(
    server: RunningServer, method: str, path: str, body: bytes | str | None = None
) -> tuple[int, str]:
    """Status and text of an answer."""
    connection = http.client.HTTPConnection(server.http, timeout=DONE_S)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def modes(server: RunningServer) -> set[int]:
    """Of the server's shared memory."""
    return {stat.S_IMODE(region.stat().st_mode) for region in shared_memory_of(server)}


def region_bytes(server: RunningServer) -> int:
    """Of the largest region."""
    return max(region.stat().st_size for region in shared_memory_of(server))


def shared_memory_is_read_and_written(bed: Bed) -> Report:
    """A client has tritonserver, over HTTP and gRPC, take ids from another's region and write there."""

    def inject() -> None:
        (region, *_) = shared_memory_of(bed.server)
        before = region.stat()
        clients = (
            (httpclient.InferenceServerClient(bed.server.http), httpclient, "403"),
            (grpcclient.InferenceServerClient(bed.server.grpc), grpcclient, "StatusCode.UNAVAILABLE"),
        )
        for client, library, status in clients:
            with contextlib.closing(client):
                error = _refusal(
                    lambda c=client: c.register_system_shared_memory("peek", f"/{region.name}", 4096)
                )
                assert error.status() == status, error
                ids = library.InferInput("input_ids", [1, 1], "INT32")
                ids.set_shared_memory("peek", 4)
                output = library.InferRequestedOutput("output_ids")
                output.set_shared_memory("peek", 4096)
                assert "got" not in str(_refusal(lambda c=client, i=ids: c.infer("llm", [i])))
                _refusal(lambda c=client, i=ids, o=output: c.infer("llm", [i], outputs=[o]))
        assert region.stat().st_ino == before.st_ino

    return bed.suffer("a client reads and writes another's shared memory", inject)


def region_is_opened_by_others(bed: Bed, prompt_bytes: int = 8 << 20) -> Report:
    """A user of the host who is not the server's looks for regions to open, while they grow."""

    def inject() -> None:
        for model, verb in (("llm", "generate"), ("llm_stream", "generate_stream")):
            body = json.dumps({"text_input": "a" * prompt_bytes, "max_tokens": 1})
            status, text = ask_http(bed.server, "POST", f"/v2/models/{model}/{verb}", body)
            assert status == 400, text
            assert "[INVALID_ARG]" in text, text
        assert region_bytes(bed.server) > prompt_bytes
        assert modes(bed.server) == {0o600}

    return bed.suffer("another user opens shared memory that has grown", inject)


def body_is_huge(bed: Bed, num_bytes: int = HUGE_BYTES) -> Report:
    """One prompt longer than all that a server may take, through each model."""

    def inject() -> None:
        for model, verb in (("llm", "generate"), ("llm_stream", "generate_stream")):
            status, text = ask_http(
                bed.server,
                "POST",
                f"/v2/models/{model}/{verb}",
                b'{"max_tokens": 1, "text_input": "' + b"a " * (num_bytes // 2) + b'"}',
            )
            assert status == 400, text
        assert region_bytes(bed.server) <= limits.DEFAULT_BYTES

    return bed.suffer(f"a prompt of {num_bytes / 1e6:.0f} MB", inject)


def connections_are_idle(bed: Bed, hold_s: float) -> Report:
    """More connections than the server may have open files, of a client that asks nothing.

    Args:
        hold_s: how long it keeps them; what asks the server for signs of life gives it up after some 100 s.
    """

    def inject() -> None:
        pid = tritonserver_of(bed.server)
        with full(bed.server):
            assert limits.num_free_descriptors(pid) <= 1
            time.sleep(hold_s)
        log = bed.server.log
        sizes = [path.stat().st_size for path in (log, log.with_name(f"{log.name}.1")) if path.exists()]
        assert sum(sizes) < MAX_LOG_BYTES
        assert tritonserver_of(bed.server) == pid

    return bed.suffer(
        f"{NUM_IDLE} idle connections, {FEW_DESCRIPTORS} descriptors, {hold_s:g} s",
        inject,
        # Some must be in flight for as long.
        max_tokens=HELD_TOKENS if hold_s else MAX_TOKENS,
    )


@contextlib.contextmanager
def full(server: RunningServer) -> Iterator[None]:
    """Idle connections fill the server, which may open few files, for as long as the block runs."""
    pid = tritonserver_of(server)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, hard))
    try:
        with contextlib.ExitStack() as connections:
            host, _, port = server.http.rpartition(":")
            for _ in range(NUM_IDLE):
                idle = connections.enter_context(socket.socket())
                idle.setblocking(False)
                # Those beyond what the kernel keeps for the server are on their way for as long as they live.
                idle.connect_ex((host, int(port)))
            deadline = time.monotonic() + DONE_S
            while limits.num_free_descriptors(pid) > 0:
                assert time.monotonic() < deadline, "the connections do not fill the server"
                time.sleep(0.05)
            yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def ports_are_taken(bed: Bed, base_model: Path) -> Report:
    """A second server is started on the ports of one that serves."""

    def inject() -> None:
        metrics = bed.server.metrics.rpartition(":")[2]
        command = [sys.executable, "-m", "manylora.cli", "serve", f"--base-model={base_model}"]
        command += ["--http-port=0", "--grpc-port=0", f"--metrics-port={metrics}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DONE_S)
        assert done.returncode == 1
        assert f"--metrics-port {metrics} on 127.0.0.1: Address already in use" in done.stderr
        assert "starting" not in done.stderr

    return bed.suffer("a second server on the same ports", inject)


def http_headers(server: RunningServer, name: str, value: str) -> bytes:
    """What comes back when the bytes of a header are sent as they are, with a question that is closed."""
    host, _, port = server.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=DONE_S) as connection:
        head = f"GET /v2/logging HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{name}: {value}\r\n\r\n"
        connection.sendall(head.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def grpc_headers(server: RunningServer, name: str, value: str, method: str = "LogSettings") -> bytes:
    """The same over gRPC: HTTP/2 has room for any byte in a header, whatever its libraries refuse to send."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/inference.GRPCInferenceService/{method}",
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
        f"triton-grpc-protocol-{name}": value,
    }
    block = b"".join(b"\0" + _sized(key) + _sized(text) for key, text in headers.items())
    host, _, port = server.grpc.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=DONE_S) as connection:
        hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")
        # An empty message, which asks for everything.
        connection.sendall(hello + _frame(1, 4, 1, block) + _frame(0, 1, 1, bytes(5)))
        with connection.makefile("rb") as stream:
            return b"".join(_frames_of_answer(stream))


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def _sized(text: str) -> bytes:
    """A string as HPACK has it, of less than 127 bytes."""
    data = text.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data


def _frames_of_answer(stream: BinaryIO) -> Iterator[bytes]:
    while head := stream.read(9):
        kind, flags = head[3], head[4]
        yield stream.read(int.from_bytes(head[:3], "big"))
        # The end of the answer's headers, a reset, or a farewell.
        if (kind in (0, 1) and flags & 1) or kind in (3, 7):
            return


def log_pump_of(server: RunningServer) -> int:
    (found,) = (
        pid
        for pid in processes.children(server.pid)
        if any("log_pump" in word for word in processes.command(pid))
    )
    return found


def write_to_log(server: RunningServer, num_bytes: int) -> None:
    """Write lines as a front end does. Returns when all have been taken."""
    line = b"x" * 99 + b"\n"
    with open(f"/proc/{stub_of(server, 'llm')}/fd/2", "wb", buffering=0) as log:
        for _ in range(num_bytes // len(line)):
            log.write(line)


def _refusal(ask: Callable[[], object]) -> InferenceServerException:
    try:
        ask()
    except InferenceServerException as error:
        return error
    raise AssertionError("served, and should not be")
