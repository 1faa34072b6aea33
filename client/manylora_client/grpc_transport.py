"""The client's requests over gRPC: ModelInfer for whole answers, one ModelStreamInfer for each stream."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from manylora_client.errors import (
    ConnectionFailed,
    Internal,
    InvalidArgument,
    ManyloraClientError,
    from_grpc,
    from_message,
)
from manylora_client.request import Request, WireValue
from manylora_client.transport import Deadline, decode
from manylora_client.types import Chunk

# Long prompts as ids pass gRPC's own limit of 4 MiB.
_CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

_PARAMETER_FIELDS: dict[type, str] = {
    bool: "bool_param",
    int: "int64_param",
    float: "double_param",
    str: "string_param",
}


class GrpcTransport:
    """A Transport over gRPC: one channel, which threads may share, and tritonclient's stubs on it.

    Each stream is a call of its own, since Triton cancels all requests of a gRPC stream together.
    """

    def __init__(self, host: str, port: int, *, tls: bool = False, headers: Mapping[str, str]) -> None:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._metadata = [(name.lower(), value) for name, value in headers.items()]
        self._channel = (
            grpc.secure_channel(address, grpc.ssl_channel_credentials(), options=_CHANNEL_OPTIONS)
            if tls
            else grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def infer(self, model: str, request: Request, deadline: Deadline) -> Chunk:
        """See Transport."""
        return _decode(self._call(self._stub.ModelInfer, _message(model, request), deadline))

    def stream(self, model: str, request: Request, deadline: Deadline) -> GrpcReplies:
        """See Transport."""
        message = _message(model, request)
        # Without it, a final reply that has no data would not be sent at all.
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        return GrpcReplies(self._call(self._stub.ModelStreamInfer, iter([message]), deadline))

    def is_ready(self, models: Sequence[str], deadline: Deadline) -> bool:
        """See Transport."""
        if not self._call(self._stub.ServerReady, service_pb2.ServerReadyRequest(), deadline).ready:
            return False
        return all(
            self._call(self._stub.ModelReady, service_pb2.ModelReadyRequest(name=model), deadline).ready
            for model in models
        )

    def close(self) -> None:
        """See Transport."""
        self._channel.close()

    def _call(self, method: Any, message: Any, deadline: Deadline) -> Any:
        try:
            return method(message, timeout=deadline.remaining_s(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise _from_rpc(error) from error
        except ValueError as error:
            # What gRPC says of a closed channel, and of a header that cannot be sent.
            raise ConnectionFailed(f"the call cannot be made: {error}") from error


class GrpcReplies:
    """The replies of one ModelStreamInfer that carries one request."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._final = False

    def __next__(self) -> Chunk:
        while True:
            try:
                reply = next(self._call)
            except StopIteration:
                if not self._final:
                    raise ConnectionFailed("the stream ended before its final reply") from None
                raise
            except grpc.RpcError as error:
                raise _from_rpc(error) from error
            if reply.error_message:
                raise from_message(reply.error_message, Internal)
            response = reply.infer_response
            self._final = response.parameters["triton_final_response"].bool_param
            # A final reply may carry the flag alone.
            if response.outputs:
                return _decode(response)

    def close(self) -> None:
        """See Replies."""
        self._call.cancel()


def _message(model: str, request: Request) -> Any:
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


def _set_parameters(message: Any, parameters: Iterable[tuple[str, WireValue]]) -> None:
    for name, value in parameters:
        try:
            setattr(message.parameters[name], _PARAMETER_FIELDS[type(value)], value)
        except (ValueError, KeyError) as error:
            raise InvalidArgument(f"parameter {name!r}={value!r} cannot be sent: {error}") from error


def _decode(response: Any) -> Chunk:
    try:
        return decode(InferResult(response).as_numpy)
    except ManyloraClientError:
        raise
    # tritonclient checks nothing of the bytes that it turns into arrays.
    except Exception as error:
        raise Internal(f"the server's reply cannot be read: {error!r}") from error


def _from_rpc(error: Any) -> ManyloraClientError:
    # Not debug_error_string(): on a cancelled stream it never returns.
    return from_grpc(error.code().name, error.details() or "")
