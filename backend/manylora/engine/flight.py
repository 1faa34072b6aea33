"""A step that was given to the device and whose tokens are not known on the host yet.

Shape key: B sampling items of the step.
"""

from __future__ import annotations

import torch

from manylora.download import Download
from manylora.engine.batch import Batch, Item
from manylora.engine.logprobs import LogprobTensors
from manylora.engine.sampler import SampledTokens
from manylora.engine.sequence import Sequence
from manylora.errors import InternalError, InvalidArgumentError, ManyloraError


class Flight:
    """From the launch of a step until the host has its results.

    Args:
        batch: the step.
        sampled: the next tokens of its sampling items, on the device.
        logprobs: log probabilities of those that ask; None where nobody does.
    """

    def __init__(self, batch: Batch, sampled: SampledTokens, logprobs: LogprobTensors | None) -> None:
        self.batch = batch
        self.ids_B = sampled.ids_B
        """[B] on the device, in the order of `Batch.sampling_items`: what the next step may read."""
        self._items = batch.sampling_items
        self._rows = {id(item.sequence): row for row, item in enumerate(self._items)}
        self._logprobs = logprobs
        self._download = Download(sampled.ids_B, sampled.is_finite_B, *(logprobs.tensors if logprobs else ()))

    def row_of(self, sequence: Sequence) -> int:
        """Where in `ids_B` the sequence's token is."""
        return self._rows[id(sequence)]

    def land(self) -> None:
        """Wait for the step and fill what its items that sample get: `next_id` and `logprobs`, or `error`."""
        ids, is_finite, *rest = self._download.wait()
        logprobs = self._logprobs.on_host(rest) if self._logprobs is not None else {}
        for row, (item, next_id, finite) in enumerate(
            zip(self._items, ids.tolist(), is_finite.tolist(), strict=True)
        ):
            if finite:
                item.next_id = next_id
                item.logprobs = logprobs.get(row)
            else:
                item.error = _overflow(item)


def nothing_sampled(device: torch.device) -> SampledTokens:
    """Of a step that ends no prompt."""
    return SampledTokens(
        torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.bool, device=device)
    )


def _overflow(item: Item) -> ManyloraError:
    sequence = item.sequence
    after = f"logits that are not finite after {item.end - sequence.num_prompt} tokens"
    if sequence.adapter is None:
        return InternalError(f"the base model gave {after}")
    return InvalidArgumentError(
        f"adapter {sequence.adapter_id!r} with adapter_scale={sequence.adapter_scale:g} gave {after}; "
        "its weights, so scaled, are too large for this model"
    )
