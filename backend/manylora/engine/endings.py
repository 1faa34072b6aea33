"""Where a sequence ends as tokens arrive. Plain Python."""

from __future__ import annotations

from collections.abc import Collection

from manylora.engine.sequence import Sequence
from manylora.engine.step import NewTokens
from manylora.messages import Tokens


class Endings:
    """Grows sequences up to their ends.

    Args:
        eos_token_ids: ids that end a sequence.
        max_model_len: no sequence is longer.
    """

    def __init__(self, eos_token_ids: Collection[int], max_model_len: int) -> None:
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = max_model_len

    def append(self, sequence: Sequence, new: NewTokens) -> Tokens:
        """Append a step's tokens, up to the one that ends the sequence; what its session is to get."""
        reason, num_new = "", 0
        while not reason and num_new < len(new.token_ids):
            sequence.token_ids.append(new.token_ids[num_new])
            reason = self._finish_reason(sequence)
            num_new += 1
        return Tokens(
            id=sequence.request_id,
            token_ids=new.token_ids[:num_new],
            finish_reason=reason,
            adapter_version=sequence.version,
            logprobs=new.logprobs[:num_new],
        )

    def will_end(self, sequence: Sequence) -> bool:
        """Whether its pending token is its last one, whatever it is."""
        return (
            sequence.num_tokens - sequence.num_prompt >= sequence.params.max_tokens
            or sequence.num_tokens >= self.max_model_len
        )

    def _finish_reason(self, sequence: Sequence) -> str:
        params, token_id = sequence.params, sequence.token_ids[-1]
        is_end = token_id in params.stop_token_ids or (
            token_id in self.eos_token_ids and not params.ignore_eos
        )
        if is_end and sequence.num_generated >= params.min_tokens:
            return "stop"
        if sequence.num_generated >= params.max_tokens or len(sequence.token_ids) >= self.max_model_len:
            return "length"
        return ""
