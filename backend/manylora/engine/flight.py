"""A step that was given to the device and whose tokens are not known on the host yet.

Shape key: B sampling items of the step.
"""

from __future__ import annotations

import torch

from manylora.download import Download
from manylora.engine.batch import Batch, Item
from manylora.engine.logprobs import Told
from manylora.engine.sampler import Chosen
from manylora.engine.sequence import Sequence
from manylora.errors import InternalError, InvalidArgumentError, ManyloraError


class Flight:
    """From the launch of a step until the host has its results.

    Args:
        batch: the step.
        chosen: the next tokens of its sampling items, on the device.
        told: log probabilities of those that ask; None where nobody does.
    """

    def __init__(self, batch: Batch, chosen: Chosen, told: Told | None) -> None:
        self.batch = batch
        self.ids_B = chosen.ids_B
        """[B] on the device, in the order of `Batch.sampling_items`: what the next step may read."""
        self._items = batch.sampling_items
        self._rows = {id(item.sequence): row for row, item in enumerate(self._items)}
        self._told = told
        self._download = Download(chosen.ids_B, chosen.is_sound_B, *(told.tensors if told else ()))

    def row_of(self, sequence: Sequence) -> int:
        """Where in `ids_B` the sequence's token is."""
        return self._rows[id(sequence)]

    def land(self) -> None:
        """Wait for the step and fill what its items that sample get: `next_id` and `logprobs`, or `error`."""
        ids, is_sound, *rest = self._download.wait()
        told = self._told.on_host(rest) if self._told is not None else {}
        for row, (item, next_id, sound) in enumerate(
            zip(self._items, ids.tolist(), is_sound.tolist(), strict=True)
        ):
            if sound:
                item.next_id = next_id
                item.logprobs = told.get(row)
            else:
                item.error = _overflow(item)


def nothing_chosen(device: torch.device) -> Chosen:
    """Of a step that ends no prompt."""
    return Chosen(
        torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.bool, device=device)
    )


def _overflow(item: Item) -> ManyloraError:
    sequence = item.sequence
    after = f"logits that are not finite after {item.end - sequence.num_prompt} tokens"
    if sequence.lease is None:
        return InternalError(f"the base model gave {after}")
    return InvalidArgumentError(
        f"adapter {sequence.adapter_id!r} with adapter_scale={sequence.adapter_scale:g} gave {after}; "
        "its weights, so scaled, are too large for this model"
    )
