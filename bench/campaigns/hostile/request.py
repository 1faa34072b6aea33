"""An inference request that need not be right, and its forms on the wire."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from .case import HttpCall

_NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
    "FP32": np.float32, "FP64": np.float64, "BF16": np.uint16,
}  # fmt: skip
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
_ESCAPES = {**{i: f"\\u{i:04x}".encode() for i in range(32)}, 34: b'\\"', 92: b"\\\\"}


@dataclass(slots=True, kw_only=True)
class Tensor:
    """An input; nothing in it need fit."""

    name: str
    datatype: str
    shape: list[int]
    values: list[Any]
    """Flat: bytes for BYTES, else numbers."""
    raw: bytes | None = None
    """What binary forms send in place of `values`."""

    def data(self) -> bytes:
        """Triton's binary form."""
        if self.raw is not None:
            return self.raw
        if self.datatype in _NUMPY:
            # What is out of the type's range wraps, as hostile as any other number.
            numbers = [value % 2**64 if isinstance(value, int) else 0 for value in self.values]
            with np.errstate(over="ignore"):
                return np.array(numbers, np.uint64).astype(_NUMPY[self.datatype]).tobytes()
        texts = [value if isinstance(value, bytes) else str(value).encode() for value in self.values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)


@dataclass(slots=True, kw_only=True)
class Request:
    """A request of either model."""

    model: str = "llm"
    tensors: list[Tensor] = field(default_factory=list)
    parameters: list[tuple[str, str]] = field(default_factory=list)
    """Name and JSON text."""
    outputs: list[dict[str, Any]] = field(default_factory=list)
    """What is asked for by name; empty is all."""


def text_tensor(texts: Sequence[bytes]) -> Tensor:
    return Tensor(name="text_input", datatype="BYTES", shape=[len(texts), 1], values=list(texts))


def ids_tensor(ids: Sequence[int]) -> Tensor:
    return Tensor(name="input_ids", datatype="INT32", shape=[1, len(ids)], values=list(ids))


def sampling_tensor(texts: Sequence[bytes]) -> Tensor:
    return Tensor(name="sampling_parameters", datatype="BYTES", shape=[len(texts), 1], values=list(texts))


def as_infer_json(request: Request) -> HttpCall:
    """`/infer` with all data in the JSON."""
    entries = []
    for tensor in request.tensors:
        head = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        entries.append(json.dumps(head).encode()[:-1] + b', "data": ' + _json_list(tensor.values) + b"}")
    body = b'{"inputs": [' + b", ".join(entries) + b"], " + _rest(request) + b"}"
    return HttpCall(path=f"/v2/models/{request.model}/infer", body=body)


def as_infer_binary(request: Request) -> HttpCall:
    """`/infer` with the data behind the JSON, in and out."""
    inputs, data = [], b""
    for tensor in request.tensors:
        part = tensor.data()
        size = {"parameters": {"binary_data_size": len(part)}}
        inputs.append({"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape, **size})
        data += part
    asked = Request(
        **{**_fields(request), "parameters": [*request.parameters, ("binary_data_output", "true")]}
    )
    head = b'{"inputs": ' + json.dumps(inputs).encode() + b", " + _rest(asked) + b"}"
    return HttpCall(
        path=f"/v2/models/{request.model}/infer",
        body=head + data,
        headers={"Inference-Header-Content-Length": str(len(head))},
    )


def as_generate(request: Request, *, is_stream: bool, is_nested: bool) -> HttpCall:
    """`/generate` or `/generate_stream`: tensors and parameters as keys of one object.

    Args:
        is_nested: the parameters stand in an object `parameters`.
    """
    keys = []
    for tensor in request.tensors:
        data = _json_list(tensor.values) if len(tensor.values) != 1 else _json_value(tensor.values[0])
        keys.append(json.dumps(tensor.name).encode() + b": " + data)
    parameters = _object(request.parameters)
    keys += (
        [b'"parameters": ' + parameters] if is_nested else [parameters[1:-1]] if request.parameters else []
    )
    verb = "generate_stream" if is_stream else "generate"
    body = b"{" + b", ".join(keys) + b"}"
    return HttpCall(path=f"/v2/models/{request.model}/{verb}", body=body, is_stream=is_stream)


def as_grpc(request: Request, *, has_typed: bool = False, request_id: str = "") -> bytes:
    """A serialised ModelInferRequest.

    Args:
        has_typed: data in the fields of its type, not as raw bytes.
        request_id: where given, the final flag is asked for too.
    """
    message = service_pb2.ModelInferRequest(model_name=request.model, id=request_id)
    for tensor in request.tensors:
        entry = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        content = _CONTENTS.get(tensor.datatype)
        if has_typed and content and tensor.raw is None:
            try:
                getattr(entry.contents, content).extend(tensor.values)
                continue
            except (TypeError, ValueError):
                entry.contents.Clear()
        message.raw_input_contents.append(tensor.data())
    for output in request.outputs:
        message.outputs.add(name=str(output["name"]))
    for name, text in request.parameters:
        _set_parameter(message, name, text)
    if request_id:
        message.parameters["triton_enable_empty_final_response"].bool_param = True
    return bytes(message.SerializeToString())


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in ("model", "tensors", "parameters", "outputs")}


def _rest(request: Request) -> bytes:
    rest = b'"parameters": ' + _object(request.parameters)
    if request.outputs:
        rest += b', "outputs": ' + json.dumps(request.outputs).encode()
    return rest


def _object(pairs: Sequence[tuple[str, str]]) -> bytes:
    return b"{" + b", ".join(json.dumps(name).encode() + b": " + text.encode() for name, text in pairs) + b"}"


def _json_list(values: Sequence[Any]) -> bytes:
    return b"[" + b", ".join(map(_json_value, values)) + b"]"


def _json_value(value: Any) -> bytes:
    """Text as its own bytes, whether they are UTF-8 or not."""
    if isinstance(value, bytes):
        return b'"' + b"".join(_ESCAPES.get(byte, bytes([byte])) for byte in value) + b'"'
    return json.dumps(value).encode()


def _set_parameter(message: Any, name: str, text: str) -> None:
    """Set what the JSON text means; what has no field of its own goes as text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    name = name.encode(errors="replace").decode()
    if isinstance(value, bool):
        message.parameters[name].bool_param = value
    elif isinstance(value, int) and -(2**63) <= value < 2**63:
        message.parameters[name].int64_param = value
    elif isinstance(value, int) and 0 <= value < 2**64:
        message.parameters[name].uint64_param = value
    elif isinstance(value, float):
        message.parameters[name].double_param = value
    else:
        sent = value if isinstance(value, str) else text
        message.parameters[name].string_param = sent.encode(errors="replace").decode()
