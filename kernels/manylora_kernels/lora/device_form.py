"""Chooses the form of the adapters' term for a device: the only place where Triton's is imported.

A CPU does without triton, which need not be installed there.
"""

from __future__ import annotations

from typing import Any

import torch

from manylora_kernels.lora.cpu_form import CPU
from manylora_kernels.lora.form import LoraForm


def form_of(device: torch.device | str, triton: bool | None = None) -> LoraForm[Any]:
    """The form for a device.

    Args:
        device: where the operations will run.
        triton: whether it is Triton's. None: everywhere but on a CPU, where its kernels run in triton's
            interpreter only.
    """
    if not (torch.device(device).type != "cpu" if triton is None else triton):
        return CPU
    from manylora_kernels.lora.triton_form import TRITON

    return TRITON
