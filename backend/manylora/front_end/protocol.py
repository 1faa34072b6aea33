"""The wire contract of design: Triton's tensors and parameters to requests, and answers to tensors.

Shape key: N sequences of a request, L ids of a prompt or the longest answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manylora.errors import InvalidArgumentError
from manylora.front_end import parameters
from manylora.messages import SamplingParams

Tensors = dict[str, npt.NDArray[Any]]

INPUTS = ("text_input", "input_ids", "sampling_parameters")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One sequence as it was asked for: its parameters read, its prompt not yet. Either a text or ids."""

    text_input: bytes | None = None
    """`read_text` reads it."""
    chat: bool = False
    """The text is a conversation or a user's message, for the chat template."""
    add_special_tokens: bool = True
    """Those with which the tokenizer begins a text; a chat has its template's."""
    input_ids: npt.NDArray[np.int32] | None = None
    """[L]"""
    adapter_id: str = ""
    adapter_scale: float = 1.0
    priority: int = 0
    deadline_ms: int = 0
    """From the moment the request came in; 0: none."""
    stop: tuple[str, ...] = ()
    echo: bool = False
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one sequence has to say in one reply."""

    text: str
    token_ids: Sequence[int]
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    adapter_version: str
    logprobs: str = ""
    """JSON, where the request asks for log probabilities."""


def decode(tensors: Mapping[str, npt.NDArray[Any]], parameters_json: str) -> list[Prompt]:
    """Read one Triton request.

    Args:
        tensors: its inputs by name, each [N, ...]; strings as bytes.
        parameters_json: its parameters, as Triton hands them over; empty for none.

    Returns: N prompts.

    Raises:
        InvalidArgumentError: the request breaks the contract; the message names the parameter or the input.
    """
    num_sequences = count_sequences(tensors)
    count_parameter_bytes(tensors, parameters_json)
    given = parameters.parse(json.loads(parameters_json or "{}"), "parameter")
    prompts = []
    for row in range(num_sequences):
        values = given
        if "sampling_parameters" in tensors:
            values = {**_row_parameters(tensors["sampling_parameters"], row, num_sequences), **given}
        prompts.append(_prompt(tensors, row, values))
    return prompts


def count_sequences(tensors: Mapping[str, npt.NDArray[Any]]) -> int:
    """The sequences of a request, before anything of it is read.

    Raises:
        InvalidArgumentError: none, or inputs that are no batch of prompts.
    """
    has_text, has_ids = "text_input" in tensors, "input_ids" in tensors
    if has_text == has_ids:
        found = "both" if has_text else "neither"
        raise InvalidArgumentError(f"got {found} of text_input and input_ids; send exactly one of them")
    for name, tensor in tensors.items():
        # Triton drops a dimension whose size is below zero.
        if tensor.ndim != 2:
            raise InvalidArgumentError(
                f"{name}: got {tensor.ndim} dimensions, allowed are 2: sequences and what each has"
            )
    num_sequences = len(tensors["text_input" if has_text else "input_ids"])
    if not num_sequences:
        raise InvalidArgumentError("got a batch of no sequences; send at least one")
    return num_sequences


def count_parameter_bytes(tensors: Mapping[str, npt.NDArray[Any]], parameters_json: str) -> int:
    """What is to be parsed for the parameters of all sequences. They are bounded before that, since parsing
    one holds up every other thread.

    Raises:
        InvalidArgumentError: a request's parameters, or those of one of its sequences, are too long.
    """
    _require_short(len(parameters_json), "parameters", "characters")
    num_bytes = len(parameters_json)
    tensor = tensors.get("sampling_parameters")
    # One of another shape is refused before it is parsed.
    if tensor is not None and tensor.shape[1] == 1:
        for cell in tensor[:, 0]:
            _require_short(len(cell), "sampling_parameters", "bytes")
            num_bytes += len(cell)
    return num_bytes


def read_text(prompt: Prompt) -> str:
    """The text of a prompt that has one.

    Raises:
        InvalidArgumentError: it is not UTF-8.
    """
    return _decode_utf8(prompt.text_input or b"", "text_input")


def encode(answers: Sequence[Answer]) -> Tensors:
    """The outputs of one reply, each [N, 1], `output_ids` [N, L] padded on the right with -1."""
    longest = max(len(answer.token_ids) for answer in answers)
    output_ids = np.full((len(answers), longest), -1, dtype=np.int32)
    for row, answer in zip(output_ids, answers, strict=True):
        row[: len(answer.token_ids)] = answer.token_ids
    return {
        "text_output": _strings([answer.text for answer in answers]),
        "output_ids": output_ids,
        "finish_reason": _strings([answer.finish_reason for answer in answers]),
        "num_input_tokens": _integers([answer.num_input_tokens for answer in answers]),
        "num_output_tokens": _integers([answer.num_output_tokens for answer in answers]),
        "logprobs": _strings([answer.logprobs for answer in answers]),
        "adapter_version": _strings([answer.adapter_version for answer in answers]),
    }


def _prompt(tensors: Mapping[str, npt.NDArray[Any]], row: int, values: Mapping[str, Any]) -> Prompt:
    sampling = {name: value for name, value in values.items() if name in SamplingParams.__struct_fields__}
    params = SamplingParams(**sampling)
    if params.min_tokens > params.max_tokens:
        raise InvalidArgumentError(
            f"parameter min_tokens: got {params.min_tokens}, allowed is up to max_tokens={params.max_tokens}"
        )
    common: dict[str, Any] = {
        "adapter_id": values.get("adapter_id", ""),
        "adapter_scale": values.get("adapter_scale", 1.0),
        "priority": values.get("request_priority", 0),
        "deadline_ms": values.get("deadline_ms", 0),
        "stop": values.get("stop", ()),
        "echo": values.get("echo", False),
        "params": params,
    }
    chat = values.get("chat", False)
    if "input_ids" in tensors:
        if chat:
            raise InvalidArgumentError("parameter chat: got true with input_ids, allowed is text_input only")
        return Prompt(input_ids=tensors["input_ids"][row].reshape(-1), **common)
    return Prompt(
        text_input=_cell(tensors["text_input"], row, "text_input"),
        chat=chat,
        add_special_tokens=values.get("add_special_tokens", True),
        **common,
    )


def _row_parameters(tensor: npt.NDArray[Any], row: int, num_sequences: int) -> dict[str, Any]:
    if len(tensor) != num_sequences:
        raise InvalidArgumentError(
            f"sampling_parameters: got {len(tensor)} rows for {num_sequences} sequences; send one for each"
        )
    cell = _cell(tensor, row, "sampling_parameters")
    text = _decode_utf8(cell, "sampling_parameters")
    if not text.strip():
        return {}
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"sampling_parameters: not JSON ({error}); send a JSON object") from error
    if not isinstance(given, dict):
        raise InvalidArgumentError(
            f"sampling_parameters: got JSON {type(given).__name__}; send a JSON object"
        )
    # A null asks for the default. A name that nobody knows stays wrong.
    given = {k: v for k, v in given.items() if v is not None or k not in parameters.PARAMETERS}
    return parameters.parse(given, "sampling_parameters key")


def _cell(tensor: npt.NDArray[Any], row: int, name: str) -> bytes:
    cells = tensor[row].reshape(-1)
    if len(cells) != 1:
        raise InvalidArgumentError(f"{name}: got {len(cells)} strings for a sequence; send one")
    return bytes(cells[0])


def _decode_utf8(raw: bytes, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{name}: not UTF-8 at byte {error.start}; send UTF-8 text") from error


def _require_short(length: int, name: str, unit: str) -> None:
    if length > parameters.MAX_CHARS:
        raise InvalidArgumentError(f"{name}: got {length} {unit}, allowed are {parameters.MAX_CHARS}")


def _strings(values: Sequence[str]) -> npt.NDArray[Any]:
    column = np.empty((len(values), 1), dtype=np.object_)
    # Lone surrogates, which a tokenizer's JSON may carry, have no UTF-8 form.
    column[:, 0] = [value.encode(errors="replace") for value in values]
    return column


def _integers(values: Sequence[int]) -> npt.NDArray[Any]:
    return np.array(values, dtype=np.int32).reshape(-1, 1)
