"""In which order copies into the device pool and steps run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch

Copied: TypeAlias = "torch.cuda.Event | None"
"""Behind a copy; None where a copy is over when the call returns."""


class CopyStream:
    """A CUDA stream beside the one that steps run on. Owned by the engine thread; no call blocks it.

    Copies run one after the other, in the order in which they were queued. Between the two streams there is
    no order but the one asked for here.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no stub
        self._freed: torch.cuda.Event | None = None

    def running(self) -> AbstractContextManager[object]:
        """What is queued, and what memory is taken, inside this context belongs to the copies."""
        return torch.cuda.stream(self._stream)

    def share(self, tensor: torch.Tensor) -> None:
        """Copies write this tensor of the steps: its memory is not reused before they are over."""
        tensor.record_stream(self._stream)

    def mark_freed(self) -> None:
        """Steps queued by now may still use memory that copies may soon write."""
        self._freed = torch.cuda.current_stream(self._device).record_event()

    def await_freed(self) -> None:
        """Let copies queued from now on wait for the steps queued before the last `mark_freed`."""
        if self._freed is not None:
            self._stream.wait_event(self._freed)

    def mark_copied(self) -> Copied:
        """Behind the copies queued so far."""
        copied: torch.cuda.Event = self._stream.record_event()
        return copied

    def await_copied(self, copied: Copied) -> None:
        """Let steps queued from now on wait for what `mark_copied` marked."""
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)


class NoCopyStream:
    """The same for a CPU, where a copy is over when the call returns: nothing is to be ordered."""

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()

    def share(self, tensor: torch.Tensor) -> None:
        pass

    def mark_freed(self) -> None:
        pass

    def await_freed(self) -> None:
        pass

    def mark_copied(self) -> Copied:
        return None

    def await_copied(self, copied: Copied) -> None:
        assert copied is None, "a CPU has no events"


def copy_stream(device: torch.device) -> CopyStream | NoCopyStream:
    """The one for the device."""
    return CopyStream(device) if device.type == "cuda" else NoCopyStream()
