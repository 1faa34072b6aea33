"""A gRPC server that speaks Triton's service and says what a test tells it to."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
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
) -> Any:
    message = service_pb2.ModelInferResponse(model_name="llm", model_version="1")
    if final is not None:
        message.parameters["triton_final_response"].bool_param = final
    strings = {"text_output": text, "finish_reason": finish, "logprobs": "", "adapter_version": "v1"}
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
        self.cancelled = threading.Event()
        self.release = threading.Event()

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name in self.ready)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        return self._say(self.script[0], context)

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        context.add_callback(self.cancelled.set)
        self.requests.extend(request_iterator)
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
