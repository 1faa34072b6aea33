"""What is said to a request whose logits are not finite."""

from __future__ import annotations

from manylora.engine.sequence import Sequence
from manylora.errors import InternalError, InvalidArgumentError, ManyloraError


def error_of(sequence: Sequence, num_tokens: int) -> ManyloraError:
    """Who is to blame: the adapter where there is one.

    Args:
        sequence: still runs.
        num_tokens: tokens of the text before the one that could not be chosen.
    """
    after = f"logits that are not finite after {num_tokens} tokens"
    if sequence.adapter is None:
        return InternalError(f"the base model gave {after}")
    return InvalidArgumentError(
        f"adapter {sequence.adapter_id!r} with adapter_scale={sequence.adapter_scale:g} gave {after}; "
        "its weights, so scaled, are too large for this model"
    )
