"""Where adapters lie on the device, as plain data that any process can be handed."""

from __future__ import annotations

from dataclasses import dataclass

Pages = tuple[tuple[int, ...], ...]
"""Ascending page numbers by `page_groups`; empty where the adapter has nothing of the group."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one adapter lies in the device pool: what every device is told to copy there, and to give up."""

    version: str
    """Content hash."""
    pages: Pages


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """What steps need to know of an adapter that a running sequence uses."""

    version: str
    """Content hash."""
    scale: float
    """The adapter's own scaling."""
    pages: Pages
