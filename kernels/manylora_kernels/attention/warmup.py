"""Compiles the attention kernels before a server serves, so that no step waits for a compiler."""

from __future__ import annotations

import torch

from manylora_kernels.shapes import ServedAttention


def warmup_attention(device: torch.device | str, served: ServedAttention) -> None:
    """Compile every kernel that `paged_attention` and `write_cache` use in steps of these shapes.

    On a CPU nothing, since they are for CUDA.

    Args:
        device: where they will run.
        served: the attention of the server's steps.
    """
    if torch.device(device).type != "cpu":
        from manylora_kernels.attention.precompile import precompile_attention  # imports triton

        precompile_attention(torch.device(device), served)
