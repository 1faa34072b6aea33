"""Many LoRA adapters on one base language model.

>>> from manylora import Engine, EngineConfig
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manylora.config import EngineConfig
from manylora.errors import ManyloraError

if TYPE_CHECKING:
    from manylora.offline import Engine

__all__ = ["Engine", "EngineConfig", "ManyloraError"]


def __getattr__(name: str) -> Any:
    # The engine imports torch and transformers, which front ends do without.
    if name == "Engine":
        from manylora.offline import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
