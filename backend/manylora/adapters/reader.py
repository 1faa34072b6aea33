"""How the server reads an adapter's directory."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import torch

from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.load import Read
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.weights import AdapterWeights
from manylora.config import EngineConfig
from manylora.model.spec import ModelSpec
from manylora.threads import use_one_thread

log = logging.getLogger(__name__)


def reader(
    config: EngineConfig, root: AdapterRoot, spec: ModelSpec, dtype: torch.dtype, *, pin: bool
) -> Read:
    """A function that reads adapters for one base model, and logs what their authors may not have
    intended."""
    of_thread = threading.local()

    def read(directory: Path) -> AdapterWeights:
        if not hasattr(of_thread, "is_alone"):
            # Those of the steps are all that there should be.
            use_one_thread()
            of_thread.is_alone = True
        weights, report = read_adapter(
            directory, spec, max_lora_rank=config.max_lora_rank, dtype=dtype, pin=pin, root=root.path
        )
        for line in report.notes():
            log.warning("adapter %s: %s", directory.name, line)
        return weights

    return read
