"""The client's requests over gRPC: ModelInfer for whole answers, one ModelStreamInfer for each stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from manylora_client import grpc_wire
from manylora_client.errors import ConnectionFailed
from manylora_client.request import Request
from manylora_client.transport import Deadline
from manylora_client.types import Chunk


class GrpcTransport:
    """A Transport over gRPC: one channel, which threads may share, and tritonclient's stubs on it.

    Each stream is a call of its own, since Triton cancels all requests of a gRPC stream together.
    """

    def __init__(self, host: str, port: int, *, tls: bool = False, headers: Mapping[str, str]) -> None:
        target, options = grpc_wire.target(host, port), grpc_wire.CHANNEL_OPTIONS
        self._metadata = grpc_wire.metadata(headers)
        self._channel = (
            grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=options)
            if tls
            else grpc.insecure_channel(target, options=options)
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._stream_method = grpc_wire.stream_method(self._channel)

    def infer(self, model: str, request: Request, deadline: Deadline) -> Chunk:
        """See Transport."""
        message = grpc_wire.infer_message(model, request)
        return grpc_wire.read_response(self._call(self._stub.ModelInfer, message, deadline))

    def stream(self, model: str, request: Request, deadline: Deadline) -> GrpcReplies:
        """See Transport."""
        message = grpc_wire.stream_message(model, request)
        return GrpcReplies(self._call(self._stream_method, message, deadline))

    def is_ready(self, models: Sequence[str], deadline: Deadline) -> bool:
        """See Transport."""
        return all(
            self._call(method, message, deadline).ready
            for method, message in grpc_wire.ready_calls(self._stub, models)
        )

    def close(self) -> None:
        """See Transport."""
        self._channel.close()

    def _call(self, method: Any, message: Any, deadline: Deadline) -> Any:
        try:
            return method(message, timeout=deadline.remaining_s(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise grpc_wire.call_error(error) from error
        except ValueError as error:
            # What gRPC says of a closed channel.
            raise ConnectionFailed(f"the call cannot be made: {error}") from error


class GrpcReplies:
    """The replies of one ModelStreamInfer that carries one request."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._replies = grpc_wire.MessageReplies()

    def __next__(self) -> Chunk:
        while True:
            try:
                message = next(self._call)
            except StopIteration:
                self._replies.end()
                raise
            except grpc.RpcError as error:
                raise grpc_wire.call_error(error) from error
            chunk = self._replies.try_read(message)
            if chunk is not None:
                return chunk

    def close(self) -> None:
        """See Replies."""
        self._call.cancel()
