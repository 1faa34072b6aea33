"""Requests and answers of Triton's gRPC service, as its messages; sent and received by the transports."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import InferResult, service_pb2

from manylora_client.errors import (
    ConnectionFailed,
    Internal,
    InvalidArgument,
    ManyloraClientError,
    from_grpc,
    from_message,
)
from manylora_client.reply import decode
from manylora_client.request import Request, WireValue
from manylora_client.types import Chunk

# Long prompts as ids pass gRPC's own limit of 4 MiB.
CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

_PARAMETER_FIELDS: dict[type, str] = {
    bool: "bool_param",
    int: "int64_param",
    float: "double_param",
    str: "string_param",
}


def target(host: str, port: int) -> str:
    """A server's address as gRPC wants it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def metadata(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Headers as gRPC wants them."""
    return [(name.lower(), value) for name, value in headers.items()]


def infer_message(model: str, request: Request) -> Any:
    """A request for ModelInfer.

    Raises:
        InvalidArgument: a parameter does not fit.
    """
    message = service_pb2.ModelInferRequest(model_name=model)
    if request.text_input is not None:
        text = request.text_input.encode()
        message.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
        message.raw_input_contents.append(struct.pack("<I", len(text)) + text)
    else:
        ids = np.asarray(request.input_ids, dtype="<i4")
        message.inputs.add(name="input_ids", datatype="INT32", shape=[1, ids.size])
        message.raw_input_contents.append(ids.tobytes())
    _set_parameters(message, request.parameters.items())
    return message


def stream_message(model: str, request: Request) -> Any:
    """A request for ModelStreamInfer. Raises as `infer_message`."""
    message = infer_message(model, request)
    # Without it, a final reply that has no data would not be sent at all.
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def ready_calls(stub: Any, models: Sequence[str]) -> list[tuple[Any, Any]]:
    """Methods and messages whose answers are all `ready` when the server and `models` are."""
    return [
        (stub.ServerReady, service_pb2.ServerReadyRequest()),
        *((stub.ModelReady, service_pb2.ModelReadyRequest(name=model)) for model in models),
    ]


def _set_parameters(message: Any, parameters: Iterable[tuple[str, WireValue]]) -> None:
    for name, value in parameters:
        try:
            setattr(message.parameters[name], _PARAMETER_FIELDS[type(value)], value)
        except (ValueError, KeyError) as error:
            raise InvalidArgument(f"parameter {name!r}={value!r} cannot be sent: {error}") from error


def stream_method(channel: Any) -> Any:
    """ModelStreamInfer of a channel, blocking or not, as a method that takes one message.

    It is the same on the wire. As one of many messages, gRPC would write the request in a thread or task of
    its own, and report a failure to write in place of the status that the server ends the call with.
    """
    return channel.unary_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )


def read_response(response: Any) -> Chunk:
    """Read a ModelInferResponse.

    Raises:
        Internal: it cannot be read.
    """
    try:
        return decode(InferResult(response).as_numpy)
    except ManyloraClientError:
        raise
    # tritonclient checks nothing of the bytes that it turns into arrays.
    except Exception as error:
        raise Internal(f"the server's reply cannot be read: {error!r}") from error


class MessageReplies:
    """Turns the messages of one ModelStreamInfer into the replies to its one request."""

    def __init__(self) -> None:
        self._is_final = False

    def try_read(self, message: Any) -> Chunk | None:
        """The reply in a message, None if it only says that no more follow.

        Raises:
            ManyloraClientError: it is an error, or cannot be read.
        """
        if message.error_message:
            raise from_message(message.error_message, Internal)
        response = message.infer_response
        self._is_final = response.parameters["triton_final_response"].bool_param
        return read_response(response) if response.outputs else None

    def end(self) -> None:
        """No messages follow.

        Raises:
            ConnectionFailed: none of them was the final one.
        """
        if not self._is_final:
            raise ConnectionFailed("the stream ended before its final reply")


def call_error(error: Any) -> ManyloraClientError:
    """The error of a call that ended with a status."""
    # Not debug_error_string(): on a cancelled stream it never returns.
    return from_grpc(error.code().name, error.details() or "")
