"""Checks that both front ends and the engine make of token ids."""

from __future__ import annotations

from collections.abc import Sequence

from manylora.errors import InvalidArgumentError
from manylora.messages import EngineInfo, SamplingParams


def check_stop_token_ids(params: SamplingParams, info: EngineInfo) -> None:
    """
    Raises:
        InvalidArgumentError: an id outside the vocabulary.
    """
    for token_id in params.stop_token_ids:
        if token_id >= info.vocab_size:
            raise InvalidArgumentError(
                f"parameter stop_token_ids: got {token_id}, allowed are ids from 0 to {info.vocab_size - 1}"
            )


def check_input_ids(input_ids: Sequence[int], info: EngineInfo) -> None:
    """Refuse a prompt that the engine cannot run.

    Raises:
        InvalidArgumentError: no ids, an id outside the vocabulary, `max_model_len` ids or more.
    """
    check_num_tokens(len(input_ids), info)
    for token_id in (min(input_ids), max(input_ids)):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidArgumentError(
                f"input_ids: got {token_id}, allowed are ids from 0 to {info.vocab_size - 1}"
            )


def check_num_tokens(num_tokens: int, info: EngineInfo) -> None:
    """
    Raises:
        InvalidArgumentError: none, or `max_model_len` or more.
    """
    if not num_tokens:
        raise InvalidArgumentError("the prompt has no tokens; send at least one")
    if num_tokens >= info.max_model_len:
        raise InvalidArgumentError(
            f"the prompt has {num_tokens} tokens; allowed are below max_model_len={info.max_model_len}"
        )
