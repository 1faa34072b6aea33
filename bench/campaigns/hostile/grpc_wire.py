"""Sends a case over gRPC and takes in all that comes back."""

from __future__ import annotations

import math
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from .case import Case, GrpcCall, Outcome, Reply
from .http_wire import unpack

_SERVICE = "/inference.GRPCInferenceService/"
_NO_LIMIT = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class GrpcWire:
    """One connection. Messages go as the bytes they are."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=_NO_LIMIT)
        self._infer: Any = self._channel.unary_unary(
            f"{_SERVICE}ModelInfer", response_deserializer=service_pb2.ModelInferResponse.FromString
        )
        self._stream: Any = self._channel.stream_stream(
            f"{_SERVICE}ModelStreamInfer",
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    def send(self, case: Case, timeout_s: float) -> Outcome:
        """Send a case and wait for its end."""
        assert isinstance(case.wire, GrpcCall)
        outcome = Outcome()
        send = self._send_stream if case.wire.is_stream else self._send_infer
        try:
            send(case.wire, case.cancel_after, outcome, timeout_s)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""
            if code == "DEADLINE_EXCEEDED":
                outcome.end = "timed out"
            elif outcome.end != "cancelled":
                # It ends the whole call, so it is the last word on each of its requests.
                outcome.add("", Reply(error=details, status=code), is_final=True)
        return outcome

    def close(self) -> None:
        self._channel.close()

    def _send_infer(
        self, call: GrpcCall, cancel_after: int | None, outcome: Outcome, timeout_s: float
    ) -> None:
        (message,) = call.messages
        if cancel_after is not None:
            outcome.end = "cancelled"
            self._infer.future(message, timeout=timeout_s).cancel()
            return
        response = self._infer(message, timeout=timeout_s)
        outcome.add("", Reply(outputs=_outputs(response), status="OK"), is_final=True)

    def _send_stream(
        self, call: GrpcCall, cancel_after: int | None, outcome: Outcome, timeout_s: float
    ) -> None:
        replies = self._stream(iter(call.messages), timeout=timeout_s)
        if cancel_after == 0:
            outcome.end = "cancelled"
            replies.cancel()
            return
        for number, each in enumerate(replies, 1):
            response = each.infer_response
            request_id = response.id if call.is_marked else ""
            is_final = response.parameters["triton_final_response"].bool_param
            reply = None
            if each.error_message:
                reply = Reply(error=each.error_message)
            elif response.outputs:
                reply = Reply(outputs=_outputs(response))
            outcome.add(request_id, reply, is_final=is_final)
            if cancel_after is not None and number >= cancel_after:
                outcome.end = "cancelled"
                replies.cancel()
                return


def _outputs(response: Any) -> dict[str, tuple[str, list[int], list[Any]]]:
    found = {}
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        shape = list(output.shape)
        values = unpack(output.datatype, data)
        if len(values) != math.prod(shape):
            raise AssertionError(f"{output.name} has {len(values)} values for shape {shape}")
        found[output.name] = (output.datatype, shape, values)
    return found
