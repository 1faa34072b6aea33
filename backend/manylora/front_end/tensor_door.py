"""The front door for Triton without the calls of Triton's own module: requests and replies as tensors.

In this package only `protocol`, `triton_model` and this module know tensors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from manylora.errors import InvalidArgumentError
from manylora.front_end import protocol
from manylora.front_end.answer import Answer
from manylora.front_end.front_end import FrontEnd
from manylora.front_end.logprobs_json import entries_json
from manylora.front_end.prompt import Prompt
from manylora.front_end.protocol import Tensors
from manylora.front_end.reply_loop import public_error
from manylora.front_end.responder import Responder
from manylora.front_end.text import Tokenizer
from manylora.front_end.tokenising import IDS_PER_CHAR
from manylora.messages import TokenLogprobs

_PARAMETER_BYTES_PER_CHAR = 4
"""Bytes of parameters that can be parsed, and stop strings prepared, in the time that tokenising one
character takes."""


class TensorRequest:
    """A request from Triton that has not been parsed yet."""

    def __init__(self, tensors: Mapping[str, npt.NDArray[Any]], parameters_json: str) -> None:
        """
        Args:
            tensors: its inputs by name, each [N, ...]; strings as bytes.
            parameters_json: its parameters, as Triton hands them over; empty for none.

        Raises:
            InvalidArgumentError: something is wrong that can be seen before anything is parsed.
        """
        self._tensors = tensors
        self._parameters_json = parameters_json
        self.num_prompts = protocol.count_sequences(tensors)
        num_bytes = protocol.count_parameter_bytes(tensors, parameters_json)
        self.parsing_cost = num_bytes // _PARAMETER_BYTES_PER_CHAR

    @property
    def num_content_bytes(self) -> int:
        if "input_ids" in self._tensors:
            return self._tensors["input_ids"].size // IDS_PER_CHAR
        return sum(map(len, self._tensors["text_input"].flat))

    def read(self) -> list[Prompt]:
        return protocol.decode(self._tensors, self._parameters_json)


class TensorResponder(Responder):
    """Replies as tensors."""

    @abstractmethod
    def send_tensors(self, outputs: Tensors, *, is_last: bool) -> None:
        """Send a reply with data."""

    def send(self, answers: Sequence[Answer], *, is_last: bool) -> None:
        self.send_tensors(protocol.encode(answers), is_last=is_last)

    def format_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer
    ) -> list[str]:
        return entries_json(token_ids, logprobs, tokenizer)


def submit(
    front_end: FrontEnd,
    responder: TensorResponder,
    tensors: Mapping[str, npt.NDArray[Any]],
    parameters_json: str,
    arrived_s: float,
) -> None:
    """Begin a request from Triton. Never raises: whatever is wrong goes to the responder.

    Args:
        arrived_s: on the monotonic clock; deadlines count from it.
    """
    try:
        request = TensorRequest(tensors, parameters_json)
        if responder.is_streaming and request.num_prompts != 1:
            raise InvalidArgumentError(
                f"got a batch of {request.num_prompts} sequences; a stream is for 1, send each by itself"
            )
    except BaseException as error:
        front_end.refuse(responder, public_error(responder, error))
    else:
        front_end.submit_unread(request, responder, arrived_s)
