"""Finds an adapter's directory by name, and nothing outside `adapter_root`."""

from __future__ import annotations

from pathlib import Path

from manylora.adapters.reasons import quote
from manylora.config import ADAPTER_NAME, resolve_directory
from manylora.errors import InvalidArgumentError, NotFoundError


class AdapterRoot:
    """The directory that holds one directory per adapter.

    Raises:
        InvalidArgumentError: `path` is no directory.
    """

    def __init__(self, path: str) -> None:
        self.path: Path | None = resolve_directory(path, "adapter_root") if path else None

    def find(self, name: str) -> Path:
        """The adapter's directory, links followed.

        Raises:
            InvalidArgumentError: `name` is none that an adapter can have, or its directory lies elsewhere.
            NotFoundError: there is no such directory.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidArgumentError(f"adapter name {quote(name)}: must match {ADAPTER_NAME.pattern}")
        if self.path is None:
            raise NotFoundError(f"adapter {name!r} is not found: this server has no adapter_root")
        try:
            directory = (self.path / name).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            # RuntimeError: how older Pythons report a loop of links.
            raise NotFoundError(f"adapter {name!r} is not found") from error
        if self.path not in directory.parents:
            raise InvalidArgumentError(f"adapter {name!r} is a link that leaves adapter_root")
        if not directory.is_dir():
            raise NotFoundError(f"adapter {name!r} is not found")
        return directory
