"""Which tokens a sequence has, and how often each of them was generated. For penalties."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt


class TokenCounts:
    """Counts of one sequence, brought up to date with what is new: a step costs one token's work."""

    def __init__(self, token_ids: Seq[int], num_prompt: int) -> None:
        self._ids = array("q", dict.fromkeys(token_ids[:num_prompt]))
        self._counts = array("q", [0] * len(self._ids))
        self._index = {token_id: i for i, token_id in enumerate(self._ids)}
        self._num_read = num_prompt

    def read(self, token_ids: Seq[int]) -> None:
        """Count the tokens that were generated since the last call."""
        for token_id in token_ids[self._num_read :]:
            index = self._index.setdefault(token_id, len(self._ids))
            if index == len(self._ids):
                self._ids.append(token_id)
                self._counts.append(0)
            self._counts[index] += 1
        self._num_read = len(token_ids)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Distinct tokens of prompt and text, as a copy."""
        return np.array(self._ids, dtype=np.int64)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How often each of `ids` was generated, as a copy; 0 for one that only the prompt has."""
        return np.array(self._counts, dtype=np.int64)
