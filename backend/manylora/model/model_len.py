"""How long sequences may be: as configured, or as the base model allows."""

from __future__ import annotations

import logging
from typing import Any

from manylora.config import EngineConfig
from manylora.errors import InvalidArgumentError, UnsupportedError

log = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 8192
_STEP_WIDE_ROPE = ("dynamic", "longrope")
"""Scalings that pick their factors by the longest position of a step: neighbours would change a sequence."""


def resolve_max_model_len(config: EngineConfig, hf_config: Any) -> int:
    """`max_model_len` with its default resolved.

    Raises:
        InvalidArgumentError: it is more than the base model has positions for.
        UnsupportedError: it is more than the model's rope scaling can be served for.
    """
    text = hf_config.get_text_config(decoder=True)
    num_positions = getattr(text, "max_position_embeddings", None)
    kind, num_served = _step_wide_rope(text)
    asked = config.max_model_len
    if not asked:
        return _default(num_positions, kind, num_served)
    if num_positions and asked > num_positions:
        raise InvalidArgumentError(
            f"max_model_len={asked}: the base model has max_position_embeddings={num_positions}"
        )
    if num_served and asked > num_served:
        raise UnsupportedError(
            f"rope_type {kind!r} changes its factors once a step has positions past {num_served}, "
            f"for all its sequences; max_model_len={asked} is not served, at most {num_served} is"
        )
    return asked


def _default(num_positions: int | None, kind: str, num_served: int | None) -> int:
    default = min(num_positions or DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_MODEL_LEN)
    if not num_served or default <= num_served:
        return default
    log.warning(
        "max_model_len is %d in place of %d: the base model's rope_type %r changes its factors once a step "
        "has positions past that",
        num_served,
        default,
        kind,
    )
    return num_served


def _step_wide_rope(text: Any) -> tuple[str, int | None]:
    """The first such scaling of a model's layers, and the positions before it changes its factors."""
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    found: list[tuple[int, str]] = []
    for rope in nested or [parameters]:
        kind = rope.get("rope_type") or rope.get("type")
        if kind in _STEP_WIDE_ROPE:
            original = (
                rope.get("original_max_position_embeddings")
                or getattr(text, "original_max_position_embeddings", None)
                or text.max_position_embeddings
            )
            found.append((original, kind))
    if not found:
        return "", None
    original, kind = min(found)
    return kind, original
