"""How the server reads an adapter's directory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.weights import AdapterWeights
from manylora.config import EngineConfig
from manylora.model.spec import ModelSpec

log = logging.getLogger(__name__)

Read = Callable[[Path], AdapterWeights]
"""Reads the adapter in a directory. Raises ManyloraError."""


def reader(
    config: EngineConfig, root: AdapterRoot, spec: ModelSpec, dtype: torch.dtype, *, pin: bool
) -> Read:
    """A function that reads adapters for one base model, and logs what their authors may not have
    intended."""

    def read(directory: Path) -> AdapterWeights:
        weights, report = read_adapter(
            directory, spec, max_lora_rank=config.max_lora_rank, dtype=dtype, pin=pin, root=root.path
        )
        for line in report.notes():
            log.warning("adapter %s: %s", directory.name, line)
        return weights

    return read
