"""AsyncClient's requests over gRPC: ModelInfer for whole answers, one ModelStreamInfer for each stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from manylora_client import grpc_wire
from manylora_client.address import Address
from manylora_client.errors import ConnectionFailed
from manylora_client.request import Request
from manylora_client.transport import Deadline
from manylora_client.types import Chunk


class AsyncGrpcTransport:
    """An AsyncTransport over gRPC: one channel, and tritonclient's stubs on it.

    Each stream is a call of its own, since Triton cancels all requests of a gRPC stream together.
    """

    def __init__(self, address: Address, headers: Mapping[str, str]) -> None:
        target, options = grpc_wire.target(address.host, address.port), grpc_wire.CHANNEL_OPTIONS
        self._metadata = grpc_wire.metadata(headers)
        self._channel = (
            grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), options=options)
            if address.is_encrypted
            else grpc.aio.insecure_channel(target, options=options)
        )
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._stream_method = grpc_wire.stream_method(self._channel)

    async def infer(self, model: str, request: Request, deadline: Deadline) -> Chunk:
        """See AsyncTransport."""
        message = grpc_wire.infer_message(model, request)
        return grpc_wire.read_response(await self._unary(self._stub.ModelInfer, message, deadline))

    def stream(self, model: str, request: Request, deadline: Deadline) -> AsyncGrpcReplies:
        """See AsyncTransport."""
        message = grpc_wire.stream_message(model, request)
        return AsyncGrpcReplies(self._call(self._stream_method, message, deadline))

    async def is_ready(self, models: Sequence[str], deadline: Deadline) -> bool:
        """See AsyncTransport."""
        for method, message in grpc_wire.ready_calls(self._stub, models):
            if not (await self._unary(method, message, deadline)).ready:
                return False
        return True

    async def close(self) -> None:
        """See AsyncTransport."""
        await self._channel.close()

    async def _unary(self, method: Any, message: Any, deadline: Deadline) -> Any:
        try:
            return await self._call(method, message, deadline)
        except grpc.aio.AioRpcError as error:
            raise grpc_wire.call_error(error) from error

    def _call(self, method: Any, message: Any, deadline: Deadline) -> Any:
        try:
            return method(message, timeout=deadline.remaining_s(), metadata=self._metadata)
        except grpc.aio.UsageError as error:
            # What gRPC says of a closed channel.
            raise ConnectionFailed(f"the call cannot be made: {error}") from error


class AsyncGrpcReplies:
    """The replies of one ModelStreamInfer that carries one request."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._replies = grpc_wire.MessageReplies()

    async def __anext__(self) -> Chunk:
        while True:
            try:
                message = await self._call.read()
            except grpc.aio.AioRpcError as error:
                raise grpc_wire.call_error(error) from error
            if message is grpc.aio.EOF:
                self._replies.end()
                raise StopAsyncIteration
            chunk = self._replies.try_read(message)
            if chunk is not None:
                return chunk

    def close(self) -> None:
        """See AsyncReplies."""
        self._call.cancel()
