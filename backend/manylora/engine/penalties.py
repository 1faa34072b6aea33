"""Makes tokens less likely, or likelier, that a sequence has already.

Shape key: B rows, V vocabulary, E distinct tokens of the rows with penalties, one row after the other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from manylora_kernels.upload import upload

from manylora.engine.sampling import Penalties

_MOST = torch.finfo(torch.float32).max


def penalise(logits_BV: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    """Apply the penalties of the rows that have some; logits of the others keep their values.

    `x > 0 ? x / repetition : x * repetition` for every token of prompt and text, then
    `x - frequency * count - presence` for every token of the text alone, as transformers and OpenAI define
    them. Results are cut to what float32 holds. A logit that is not finite stays as it is.

    Args:
        logits_BV: [B, V], any float type; float32 is changed in place.
        penalties: of some of the rows.

    Returns:
        The logits in float32.
    """
    # A penalty is often smaller than the step between two 16-bit numbers.
    logits_BV = logits_BV.float()
    served_E = penalties.ids < logits_BV.shape[1]

    def spread(values: npt.NDArray[np.float64] | npt.NDArray[np.int64], dtype: torch.dtype) -> torch.Tensor:
        """[E] one value of each row, for each of its tokens."""
        return upload(np.repeat(values, penalties.num_ids)[served_E], logits_BV.device).to(dtype)

    repetition = spread(penalties.repetition, torch.float32)
    frequency = spread(penalties.frequency, torch.float32)
    presence = spread(penalties.presence, torch.float32)
    index = (spread(penalties.rows, torch.int64), upload(penalties.ids[served_E], logits_BV.device))
    count = upload(penalties.counts[served_E], logits_BV.device)
    found = logits_BV[index]
    lowered = torch.where(found > 0, found / repetition, found * repetition)
    lowered -= frequency * count + presence * (count > 0)
    logits_BV[index] = torch.where(found.isfinite(), lowered.clamp(-_MOST, _MOST), found)
    return logits_BV
