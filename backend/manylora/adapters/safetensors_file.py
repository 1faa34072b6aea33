"""The safetensors container, checked to the last byte before any tensor is made from it.

Layout: 8 bytes with the header's length (little endian), the header (a JSON object of name -> dtype,
shape, data_offsets, padded with spaces), then the data, which the tensors cover without gap or overlap.

Tensors are views of the bytes that were read and hashed. The safetensors library is not used for that:
it would parse the header a second time and copy every tensor once more while it holds the interpreter's
lock, which the engine's step needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from manylora.adapters.reasons import quote
from manylora.adapters.strict_json import parse_object
from manylora.errors import InvalidArgumentError

MAX_HEADER_BYTES = 4 << 20
"""About 30,000 tensors. A header is parsed in one go under the interpreter's lock."""
PREFIX_BYTES = 8

FLOAT_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes that an adapter's tensors may have."""

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
_MAX_DIMS = 8
_MAX_SIZE = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of the file, known from the header."""

    name: str
    dtype: str
    """The container's name for it, e.g. `BF16`."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the data."""
    end: int


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Length of the header in bytes, from the file's first 8 bytes and its size.

    Raises:
        InvalidArgumentError: the file cannot hold such a header, or it is over MAX_HEADER_BYTES.
    """
    if len(prefix) < PREFIX_BYTES:
        raise InvalidArgumentError(f"the safetensors file has {len(prefix)} bytes; even an empty one has 10")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidArgumentError(
            f"the safetensors header claims {length} bytes; at most {MAX_HEADER_BYTES} are read"
        )
    if length > file_bytes - PREFIX_BYTES:
        raise InvalidArgumentError(
            f"the safetensors header claims {length} bytes, but only {file_bytes - PREFIX_BYTES} follow"
        )
    return length


def parse_header(header: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    """The file's tensors by name.

    Args:
        header: the JSON text.
        data_bytes: bytes of the file after the header. The tensors must cover exactly these.

    Raises:
        InvalidArgumentError: the header is not well-formed or does not fit the data.
    """
    if not header.startswith(b"{"):
        raise InvalidArgumentError("the safetensors header does not begin with '{'")
    entries = parse_object(header, "the safetensors header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidArgumentError("__metadata__ in the safetensors header must map text to text")
    tensors = {name: _parse_entry(name, entry) for name, entry in entries.items()}
    _check_cover(tensors, data_bytes)
    return tensors


def tensor_of(info: TensorInfo, data: bytearray) -> torch.Tensor:
    """The tensor as a view of the file's data. Only for the dtypes of FLOAT_DTYPES."""
    count = math.prod(info.shape)
    if not count:
        return torch.empty(info.shape, dtype=FLOAT_DTYPES[info.dtype])
    flat = torch.frombuffer(data, dtype=FLOAT_DTYPES[info.dtype], count=count, offset=info.begin)
    return flat.view(info.shape)


def _parse_entry(name: str, entry: Any) -> TensorInfo:
    what = f"the safetensors header's entry {quote(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidArgumentError(f"{what} must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise InvalidArgumentError(f"{what} has dtype {quote(dtype)}; known are {', '.join(_ITEM_BYTES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise InvalidArgumentError(f"{what} has shape {quote(shape)}; expected up to {_MAX_DIMS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidArgumentError(f"{what} has data_offsets {quote(offsets)}; expected [begin, end]")
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise InvalidArgumentError(
            f"{what} spans {offsets[1] - offsets[0]} bytes, but {dtype} {list(shape)} takes {expected}"
        )
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])


def _are_sizes(values: Any) -> bool:
    # bool is an int in Python, but true is not a size.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)


def _check_cover(tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    position = 0
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != position:
            relation = "overlaps the tensor before it" if info.begin < position else "leaves a gap before it"
            raise InvalidArgumentError(
                f"tensor {quote(info.name)} begins at byte {info.begin}, not {position}: it {relation}"
            )
        position = info.end
    if position > data_bytes:
        raise InvalidArgumentError(
            f"the file is truncated: its tensors take {position} bytes, but {data_bytes} follow the header"
        )
    if position < data_bytes:
        raise InvalidArgumentError(
            f"the file is over-long: its tensors take {position} bytes, but {data_bytes} follow the header"
        )
