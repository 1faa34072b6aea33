"""A step that was given to the device and whose tokens are not known on the host yet.

Shape key: S sequences of the step that sample.
"""

from __future__ import annotations

import torch

from manylora.download import Download
from manylora.engine.logprobs import LogprobTensors
from manylora.engine.sampler import SampledTokens
from manylora.engine.step import NewTokens, StepError, StepResult


class Flight:
    """From the launch of a step until the host has its results.

    Args:
        number: the step's.
        sampled: the next tokens of its sequences that sample, on the device.
        logprobs: log probabilities of those that ask; None where nobody does.
    """

    def __init__(self, number: int, sampled: SampledTokens, logprobs: LogprobTensors | None) -> None:
        self.number = number
        self.ids_S = sampled.ids_B
        """[S] on the device, in the order of the step: what the next step may read."""
        self._logprobs = logprobs
        self._download = Download(sampled.ids_B, sampled.is_finite_B, *(logprobs.tensors if logprobs else ()))

    def land(self) -> StepResult:
        """Wait for the step."""
        ids, is_finite, *rest = self._download.wait()
        logprobs = self._logprobs.on_host(rest) if self._logprobs is not None else {}
        sampled = []
        for row, (token_id, finite) in enumerate(zip(ids.tolist(), is_finite.tolist(), strict=True)):
            if not finite:
                sampled.append(NewTokens([], error=StepError.NOT_FINITE))
            elif row in logprobs:
                sampled.append(NewTokens([token_id], [logprobs[row]]))
            else:
                sampled.append(NewTokens([token_id]))
        return StepResult(self.number, sampled)


def nothing_sampled(device: torch.device) -> SampledTokens:
    """Of a step that ends no prompt."""
    return SampledTokens(
        torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.bool, device=device)
    )
