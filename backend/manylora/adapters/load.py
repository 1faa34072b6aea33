"""One load: look at the files, read them, and look again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from manylora.adapters.adapter_files import Sight
from manylora.errors import InternalError, ManyloraError

if TYPE_CHECKING:
    from manylora.adapters.weights import AdapterWeights

log = logging.getLogger(__name__)

Look = Callable[[str], Sight]
"""Looks at the files of the adapter with a name. Raises ManyloraError."""
Read: TypeAlias = "Callable[[Path], AdapterWeights]"
"""Reads the adapter in a directory. Raises ManyloraError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The outcome of a load: weights or an error."""

    sight: Sight
    """How the files stood before they were read."""
    weights: AdapterWeights | None = None
    error: ManyloraError | None = None
    is_torn: bool = False
    """The files may have been in the middle of being replaced: one new, the other old."""


def load(name: str, seen: Sight, look: Look, read: Read, settle_s: float) -> Loaded:
    """Read one adapter. Errors name it; an unexpected one is logged and becomes INTERNAL.

    Stat cannot distinguish a finished pair of files from a new config beside old weights that are about to be
    replaced. So what is read counts only if the files had not been touched for `settle_s`.

    Args:
        seen: the look that led to this load: the files had not been touched for `settle_s` then.
        look: looks at the files.
        read: reads the directory.
        settle_s: 0: files that do not change while they are read are enough.

    Raises:
        ManyloraError: the files cannot be looked at, or are gone.
    """
    before = look(name)
    weights, error = None, before.error
    if error is None:
        try:
            weights = read(before.directory)
        except ManyloraError as raised:
            error = raised
        except Exception:
            log.exception("loading adapter %r failed", name)
            error = InternalError("could not be loaded; the log has the reason")
    is_settled = settle_s == 0 or before.stamp == seen.stamp or before.age_s >= settle_s
    has_changed = before.stamp != look(name).stamp
    is_torn = not is_settled or (has_changed and (settle_s > 0 or error is not None))
    return Loaded(sight=before, weights=weights, error=named(name, error), is_torn=is_torn)


def named(name: str, error: ManyloraError | None) -> ManyloraError | None:
    """The error with the adapter's name in front."""
    if error is None:
        return None
    separator = " " if isinstance(error, InternalError) else ": "
    return type(error)(f"adapter {name!r}{separator}{error.message}")
