"""A gRPC server that speaks Triton's service and says what a test tells it to."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from manylora_client import Completion
from tritonclient.grpc import service_pb2, service_pb2_grpc

ANSWER = Completion(
    text="é!",
    token_ids=[5, 6],
    finish_reason="stop",
    num_input_tokens=3,
    num_output_tokens=2,
    adapter_version="v1",
)


def response(
    text: str = "é!",
    ids: tuple[int, ...] = (5, 6),
    finish: str = "stop",
    final: bool | None = None,
    leave_out: str = "",
    logprobs: str = "",
) -> Any:
    message = service_pb2.ModelInferResponse(model_name="llm", model_version="1")
    if final is not None:
        message.parameters["triton_final_response"].bool_param = final
    strings = {"text_output": text, "finish_reason": finish, "logprobs": logprobs, "adapter_version": "v1"}
    integers = {"output_ids": ids, "num_input_tokens": (3,), "num_output_tokens": (2,)}
    for name, value in strings.items():
        if name != leave_out:
            data = value.encode()
            message.outputs.add(name=name, datatype="BYTES", shape=[1, 1])
            message.raw_output_contents.append(struct.pack("<I", len(data)) + data)
    for name, numbers in integers.items():
        if name != leave_out:
            message.outputs.add(name=name, datatype="INT32", shape=[1, len(numbers)])
            message.raw_output_contents.append(struct.pack(f"<{len(numbers)}i", *numbers))
    return message


def only_flag() -> Any:
    message = service_pb2.ModelInferResponse(model_name="llm", model_version="1")
    message.parameters["triton_final_response"].bool_param = True
    return message


def reply(message: Any) -> Any:
    return service_pb2.ModelStreamInferResponse(infer_response=message)


def failure(text: str) -> Any:
    return service_pb2.ModelStreamInferResponse(error_message=text)


class ScriptedTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Gives each call the replies of the script; a pair of status and text ends the call so."""

    def __init__(self, script: list[Any]) -> None:
        self.script = script
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.ready = {"llm", "llm_stream"}
        self.arrived = threading.Event()
        self.cancelled = threading.Event()
        """A call has ended, by the script or because the client cancelled it."""
        self.release = threading.Event()

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name in self.ready)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        context.add_callback(self.cancelled.set)
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.arrived.set()
        return self._say(self.script[0], context)

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        context.add_callback(self.cancelled.set)
        self.requests.extend(request_iterator)
        self.arrived.set()
        for item in self.script:
            yield self._say(item, context)

    def _say(self, item: Any, context: Any) -> Any:
        if isinstance(item, tuple):
            context.abort(*item)
        if item is HOLD:
            self.release.wait(30)
            context.abort(grpc.StatusCode.INTERNAL, "released")
        return item


HOLD = object()
"""In a script: wait until the test ends."""


@contextlib.contextmanager
def running(servicer: Any, num_threads: int = 4) -> Iterator[tuple[Any, str]]:
    """A server of `servicer`, and its URL."""
    server = grpc.server(ThreadPoolExecutor(num_threads))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield server, f"grpc://127.0.0.1:{port}"
    finally:
        servicer.release.set()
        server.stop(None).wait()


class CrowdTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Holds each request until `num_at_once` are there, then answers them all, and so on."""

    def __init__(self, num_at_once: int) -> None:
        self.release = threading.Event()
        self._gate = threading.Barrier(num_at_once, timeout=60)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self._gate.wait()
        return response()

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        self._gate.wait()
        yield reply(response(final=True))


class Relay:
    """Passes one connection's bytes on to a server, both ways, until it is cut."""

    def __init__(self, url: str) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"grpc://127.0.0.1:{self._listener.getsockname()[1]}"
        self._port = int(url.rsplit(":", 1)[1])
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """Break the connection, and refuse others."""
        self._listener.close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._port))
        self._ends = [client, server]
        for source, target in ((client, server), (server, client)):
            thread = threading.Thread(target=self._pass_on, args=(source, target))
            thread.start()
            self._threads.append(thread)

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                target.sendall(part)
