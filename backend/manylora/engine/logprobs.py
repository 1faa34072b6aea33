"""The model's own log probabilities of chosen tokens and of the likeliest ones.

Shape key: B sampled rows, A of them with log probabilities, V vocabulary, N the most alternatives of one.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from manylora_kernels.upload import upload

from manylora.engine.candidates import best_of_rows
from manylora.engine.sampling import Sampling
from manylora.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Distributions:
    """Log-softmax of the rows that want log probabilities, in float32."""

    rows: list[int]
    """A of the B."""
    num_top: list[int]
    """[A] alternatives that each wants."""
    logprobs_AV: torch.Tensor

    def gather(self, ids_B: torch.Tensor) -> LogprobTensors:
        """Look up the chosen tokens' and the likeliest ones' log probabilities; waits for nothing.

        Args:
            ids_B: [B], int64.
        """
        ids_A1 = ids_B.index_select(0, upload(np.asarray(self.rows), ids_B.device))[:, None]
        most = min(max(self.num_top), self.logprobs_AV.shape[1])
        values_AN, ids_AN = best_of_rows(self.logprobs_AV, most)
        own_A = self.logprobs_AV.gather(1, ids_A1).squeeze(1)
        return LogprobTensors(self.rows, self.num_top, (own_A, values_AN, ids_AN))


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log probabilities of the chosen tokens and of the best ones, equal ones by id."""

    rows: list[int]
    num_top: list[int]
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """The chosen token's [A], the best ones' [A, N] and these ones' ids [A, N]."""

    def on_host(self, tensors: Seq[torch.Tensor]) -> dict[int, TokenLogprobs]:
        """The log probabilities of each row that wants them.

        Args:
            tensors: copies of `tensors` on the host.
        """
        own, values, ids = (tensor.tolist() for tensor in tensors)
        return {
            row: TokenLogprobs(logprob=own[a], top=list(zip(ids[a][:num], values[a][:num], strict=True)))
            for a, (row, num) in enumerate(zip(self.rows, self.num_top, strict=True))
        }


def distributions(logits_BV: torch.Tensor, sampling: Sampling) -> Distributions | None:
    """The distributions of the rows that want log probabilities; None where none does.

    Args:
        logits_BV: [B, V], the model's own: before penalties, forbidden ends and temperature.
        sampling: the settings of the B rows.
    """
    if not len(sampling.logprob_rows):
        return None
    asked = logits_BV.index_select(0, upload(sampling.logprob_rows, logits_BV.device))
    logprobs_AV = asked.float().log_softmax(-1)
    # A row that is not finite is reported to nobody, but is sorted with the others.
    logprobs_AV.masked_fill_(logprobs_AV.isnan(), float("-inf"))
    return Distributions(sampling.logprob_rows.tolist(), sampling.num_logprobs.tolist(), logprobs_AV)
