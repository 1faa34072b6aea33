"""The least time that a step can take: bytes that must be moved, over what the device moves.

Shape key: T rows, D adapters, S linears of a site, K inputs, N outputs of all S, r rank.

Weights count once for each adapter that has rows, with its true rank: `sum over adapters of r (S K + N)`.
Activations, x once and y there and back, count for prompts only: a decode step's stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.gpu.shapes import Layer, Point


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What the device moves, bytes a second, as measured here."""

    read: float
    copy: float
    """Read and written together."""
    read_by: str = ""
    """The operation that read fastest."""

    def or_larger(self, other: Bandwidth) -> Bandwidth:
        """The larger of each: what was measured while the device was slower says nothing of it."""
        faster = max(self, other, key=lambda found: found.read)
        return Bandwidth(faster.read, max(self.copy, other.copy), faster.read_by)


def weight_bytes(point: Point, layer: Layer, itemsize: int) -> int:
    """Of the adapters that have rows, in one layer."""
    columns = sum(site.num_linears * site.num_inputs + site.num_outputs for site in layer.values())
    used = [slot for slot in np.unique(point.slots()).tolist() if slot >= 0]
    return sum(point.rank(slot) for slot in used) * columns * itemsize


def activation_bytes(point: Point, layer: Layer, itemsize: int) -> int:
    """Of the rows that have an adapter, in one layer."""
    columns = sum(site.num_inputs + 2 * site.num_outputs for site in layer.values())
    return int((point.slots() >= 0).sum()) * columns * itemsize


def moved_bytes(point: Point, layer: Layer, itemsize: int) -> int:
    """The least that one layer moves through the device's memory."""
    moved = weight_bytes(point, layer, itemsize)
    return moved + activation_bytes(point, layer, itemsize) if point.is_prefill else moved


def floor_us(point: Point, layer: Layer, itemsize: int, bandwidth: Bandwidth) -> float:
    """Microseconds of one layer below which no form can go."""
    seconds = weight_bytes(point, layer, itemsize) / bandwidth.read
    if point.is_prefill:
        seconds += activation_bytes(point, layer, itemsize) / bandwidth.copy
    return seconds * 1e6


def base_bytes(layer: Layer, num_layers: int, vocab: int, hidden: int, itemsize: int) -> int:
    """Of a model's linears and its head: what a decode step reads of the base model."""
    linears = sum(site.num_inputs * site.num_outputs for site in layer.values())
    return (num_layers * linears + vocab * hidden) * itemsize
