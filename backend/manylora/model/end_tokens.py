"""The tokens that end a sequence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from manylora import paths
from manylora.errors import InvalidArgumentError

log = logging.getLogger(__name__)


def resolve_end_tokens(asked: Sequence[int], directory: Path, hf_config: Any, vocab_size: int) -> list[int]:
    """The ids that were asked for; else those that generation configuration, model and tokenizer name.

    No single one can be trusted: models are published whose tokenizer ends a turn with another token than
    their generation configuration names. Ids that the model has no logits for are left out.

    Raises:
        InvalidArgumentError: an id that was asked for lies outside the vocabulary.
    """
    tokenizer = _try_read_tokenizer(directory)
    if asked:
        if max(asked) >= vocab_size:
            raise InvalidArgumentError(
                f"eos_token_ids: got {max(asked)}, allowed are ids from 0 to {vocab_size - 1}"
            )
        named = list(asked)
    else:
        named = _generation_ids(directory)
        for config in (hf_config, hf_config.get_text_config(decoder=True), tokenizer):
            named += _as_list(getattr(config, "eos_token_id", None))
    token_ids = [token_id for token_id in dict.fromkeys(named) if 0 <= token_id < vocab_size]
    names = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" if tokenizer else str(i) for i in token_ids]
    log.info("end tokens: %s", ", ".join(names) or "none")
    return token_ids


def _generation_ids(directory: Path) -> list[int]:
    try:
        return _as_list(GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id)
    except OSError:  # the model has none
        return []


def _try_read_tokenizer(directory: Path) -> Any:
    """None: it has none that can be read, which whoever needs one reports."""
    try:
        with paths.readable_directory(directory) as readable:
            return AutoTokenizer.from_pretrained(readable, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _as_list(token_ids: int | Sequence[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)
