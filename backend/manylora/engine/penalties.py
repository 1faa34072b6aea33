"""Makes tokens less likely, or likelier, that a sequence has already.

Shape key: B sequences, V vocabulary, E distinct tokens of the sequences that ask, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from manylora_kernels.upload import upload

from manylora.engine.sequence import Sequence
from manylora.engine.token_counts import TokenCounts
from manylora.messages import SamplingParams

_MOST = torch.finfo(torch.float32).max


def penalise(logits_BV: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Apply the penalties of the rows that ask for some; logits of the others keep their values.

    `x > 0 ? x / repetition : x * repetition` for every token of prompt and text, then
    `x - frequency * count - presence` for every token of the text alone, as transformers and OpenAI define
    them. Results are cut to what float32 holds. A logit that is not finite stays as it is.

    Args:
        logits_BV: [B, V], any float type; float32 is changed in place.
        sequences: B, in row order.

    Returns:
        The logits: the very tensor when nobody asks, else in float32.
    """
    asking = [(row, s) for row, s in enumerate(sequences) if asks(s.params)]
    if not asking:
        return logits_BV
    # A penalty is often smaller than the step between two 16-bit numbers.
    logits_BV = logits_BV.float()
    rows, ids, counts, lengths = [], [], [], []
    for row, sequence in asking:
        known = _counts(sequence)
        served = known.ids < logits_BV.shape[1]
        ids.append(known.ids[served])
        counts.append(known.counts[served])
        lengths.append(len(ids[-1]))
        rows.append(row)

    def spread(values: Seq[float], dtype: torch.dtype) -> torch.Tensor:
        """[E] one value of each sequence, for each of its tokens."""
        repeated = np.repeat(np.asarray(values), lengths)
        return upload(repeated, logits_BV.device).to(dtype)

    def joined(arrays: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> torch.Tensor:
        return upload(np.concatenate(arrays), logits_BV.device)

    params = [s.params for _, s in asking]
    repetition = spread([p.repetition_penalty for p in params], torch.float32)
    frequency = spread([p.frequency_penalty for p in params], torch.float32)
    presence = spread([p.presence_penalty for p in params], torch.float32)
    index = (spread(rows, torch.int64), joined(ids))
    count = joined(counts)
    found = logits_BV[index]
    lowered = torch.where(found > 0, found / repetition, found * repetition)
    lowered -= frequency * count + presence * (count > 0)
    logits_BV[index] = torch.where(found.isfinite(), lowered.clamp(-_MOST, _MOST), found)
    return logits_BV


def asks(params: SamplingParams) -> bool:
    """Whether a token is made less likely, or likelier, by those that are there."""
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)


def _counts(sequence: Sequence) -> TokenCounts:
    if sequence.counts is None:
        sequence.counts = TokenCounts(sequence.token_ids, sequence.num_prompt)
    sequence.counts.read(sequence.token_ids)
    return sequence.counts
