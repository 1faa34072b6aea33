"""Faults in the base model's files under a running server."""

from __future__ import annotations

import os
from pathlib import Path

from bench.campaigns.faults.load import Bed, Report

WEIGHTS = "model.safetensors"
_TOKENS = 64


def rewritten_and_truncated(bed: Bed, base_model: Path) -> Report:
    """The weights are overwritten in place, then cut off, and stay so until the load has its answers.

    Args:
        base_model: what the server serves. The file is as it was afterwards.
    """
    path = base_model / WEIGHTS
    content = path.read_bytes()

    def inject() -> None:
        with path.open("r+b") as file:
            # The header stays: these are other weights, all of them zero.
            file.seek(8 + int.from_bytes(content[:8], "little"))
            file.write(bytes(len(content) - file.tell()))
            file.flush()
            os.truncate(path, 0)

    try:
        return bed.suffer("base weights rewritten, then truncated", inject, max_tokens=_TOKENS)
    finally:
        path.write_bytes(content)
