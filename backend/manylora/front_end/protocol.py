"""The wire contract: Triton's tensors and parameters to prompts, and answers to tensors.

Shape key: N sequences of a request, L ids of a prompt or the longest answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from manylora.errors import InvalidArgumentError
from manylora.front_end import parameters
from manylora.front_end.answer import Answer
from manylora.front_end.logprobs_json import join_entries
from manylora.front_end.prompt import Prompt, make_prompt
from manylora.front_end.tokenising import decode_utf8

Tensors = dict[str, npt.NDArray[Any]]

INPUTS = ("text_input", "input_ids", "sampling_parameters")


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
    """The number of sequences in a request, before anything of it is parsed.

    Raises:
        InvalidArgumentError: it has none, or its inputs are not a batch of prompts.
    """
    has_text, has_ids = "text_input" in tensors, "input_ids" in tensors
    if has_text == has_ids:
        found = "both" if has_text else "neither"
        raise InvalidArgumentError(f"got {found} of text_input and input_ids; send exactly one of them")
    for name, tensor in tensors.items():
        # Triton drops a dimension whose size is negative.
        if tensor.ndim != 2:
            raise InvalidArgumentError(
                f"{name}: got {tensor.ndim} dimensions, allowed are 2: sequences and what each has"
            )
    num_sequences = len(tensors["text_input" if has_text else "input_ids"])
    if not num_sequences:
        raise InvalidArgumentError("got a batch of no sequences; send at least one")
    return num_sequences


def count_parameter_bytes(tensors: Mapping[str, npt.NDArray[Any]], parameters_json: str) -> int:
    """Bytes of JSON to parse for the parameters of all sequences. Their length is checked before any is
    parsed, since parsing one holds up every other thread.

    Raises:
        InvalidArgumentError: a request's parameters, or those of one of its sequences, are too long.
    """
    _require_short(len(parameters_json), "parameters", "characters")
    num_bytes = len(parameters_json)
    tensor = tensors.get("sampling_parameters")
    # A tensor of another shape is refused before it is parsed.
    if tensor is not None and tensor.shape[1] == 1:
        for cell in tensor[:, 0]:
            _require_short(len(cell), "sampling_parameters", "bytes")
            num_bytes += len(cell)
    return num_bytes


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
        "logprobs": _strings(
            ["" if answer.logprobs is None else join_entries(answer.logprobs) for answer in answers]
        ),
        "adapter_version": _strings([answer.adapter_version for answer in answers]),
    }


def _prompt(tensors: Mapping[str, npt.NDArray[Any]], row: int, values: Mapping[str, Any]) -> Prompt:
    if "input_ids" in tensors:
        # A sequence of plain integers over the same memory.
        return make_prompt(values, input_ids=np.ravel(tensors["input_ids"][row]).data)
    return make_prompt(values, text=_cell(tensors["text_input"], row, "text_input"))


def _row_parameters(tensor: npt.NDArray[Any], row: int, num_sequences: int) -> dict[str, Any]:
    if len(tensor) != num_sequences:
        raise InvalidArgumentError(
            f"sampling_parameters: got {len(tensor)} rows for {num_sequences} sequences; send one for each"
        )
    cell = _cell(tensor, row, "sampling_parameters")
    text = decode_utf8(cell, "sampling_parameters")
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
    # A null means the default. An unknown name remains an error.
    given = {k: v for k, v in given.items() if v is not None or k not in parameters.PARAMETERS}
    return parameters.parse(given, "sampling_parameters key")


def _cell(tensor: npt.NDArray[Any], row: int, name: str) -> bytes:
    cells = tensor[row].reshape(-1)
    if len(cells) != 1:
        raise InvalidArgumentError(f"{name}: got {len(cells)} strings for a sequence; send one")
    return bytes(cells[0])


def _require_short(length: int, name: str, unit: str) -> None:
    if length > parameters.MAX_CHARS:
        raise InvalidArgumentError(f"{name}: got {length} {unit}, allowed are {parameters.MAX_CHARS}")


def _strings(values: Sequence[str]) -> npt.NDArray[Any]:
    column = np.empty((len(values), 1), dtype=np.object_)
    # Lone surrogates, which a tokenizer's JSON may contain, have no UTF-8 form.
    column[:, 0] = [value.encode(errors="replace") for value in values]
    return column


def _integers(values: Sequence[int]) -> npt.NDArray[Any]:
    return np.array(values, dtype=np.int32).reshape(-1, 1)
