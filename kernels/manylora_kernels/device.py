"""What the kernels need to know of a device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """Facts of one kind of device, from which plans are chosen."""

    name: str
    num_units: int
    """Multiprocessors."""
    shared_bytes: int
    """Most shared memory of one program."""
    has_dependent_launch: bool
    """Whether a kernel may start before the one in front of it has ended: CUDA from capability 9.0."""


INTERPRETER = Device("interpreter", num_units=132, shared_bytes=227 << 10, has_dependent_launch=False)
"""A CPU under triton's interpreter: planned like a card with 132 multiprocessors."""


@functools.lru_cache(maxsize=16)
def facts(device: torch.device) -> Device:
    """Read the facts of a device, once."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    is_cuda = torch.version.hip is None
    # AMD's driver and older versions of torch do not report it: the least that any supported card has.
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 99 << 10) if is_cuda else 64 << 10
    return Device(
        name=properties.name,
        num_units=properties.multi_processor_count,
        shared_bytes=shared_bytes,
        has_dependent_launch=is_cuda and properties.major >= 9,
    )
