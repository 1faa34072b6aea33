"""Finds an adapter's directory by name, and nothing outside `adapter_root`."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from manylora.adapters.adapter_files import Sight, look_at
from manylora.adapters.reasons import quote
from manylora.answered import answered
from manylora.config import ADAPTER_NAME, resolve_directory
from manylora.errors import InvalidArgumentError, NotFoundError, UnavailableError

log = logging.getLogger(__name__)

RESOLVE_S = 5.0
"""Longest that the engine's start waits for the file system of adapter_root."""

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""How the system reports a path that leads nowhere. Any other error leaves that open."""


class AdapterRoot:
    """The directory that holds one directory per adapter.

    Args:
        strict: whether a path that is not a directory is an error. Otherwise it is logged, and requests for
            an adapter fail until there is one.

    Raises:
        InvalidArgumentError: `path` is not a directory. With `strict` only.
    """

    def __init__(self, path: str, *, strict: bool = True) -> None:
        self._given = path
        self.path: Path | None = None
        """Links followed. None: there is none, or it could not be resolved so far."""
        if path:
            try:
                self._resolve_aside()
            except InvalidArgumentError as error:
                if strict:
                    raise
                log.error("%s; there are no adapters until it is there", error.message)

    def _resolve_aside(self) -> None:
        """Resolve the path on a thread that may hang. If it does, `find` tries again, on a loader's
        thread."""
        try:
            self.path = answered(
                f"adapter_root={self._given!r}",
                lambda: resolve_directory(self._given, "adapter_root"),
                RESOLVE_S,
            )
        except UnavailableError as error:
            log.error("%s", error.message)

    def check_name(self, name: str) -> None:
        """Refuse a name that no adapter can have, without touching the disk.

        Raises:
            InvalidArgumentError: no adapter can have this name.
            NotFoundError: this server has no adapters.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidArgumentError(f"adapter name {quote(name)}: must match {ADAPTER_NAME.pattern}")
        if not self._given:
            raise NotFoundError(f"adapter {name!r} is not found: this server has no adapter_root")

    def find(self, name: str) -> Path:
        """The adapter's directory, links followed.

        Raises:
            InvalidArgumentError: no adapter can have this name, or its directory lies elsewhere.
            NotFoundError: there is no such directory.
            UnavailableError: whether there is one cannot be determined now.
        """
        self.check_name(name)
        if self.path is None:
            self.path = self._resolve_for(name)
        try:
            directory = (self.path / name).resolve(strict=True)
            if self.path not in directory.parents:
                raise InvalidArgumentError(f"adapter {name!r} is a link that leaves adapter_root")
            is_directory = directory.is_dir()
        except (OSError, RuntimeError) as error:
            # RuntimeError is how older Pythons report a loop of links.
            if isinstance(error, OSError) and error.errno not in _ABSENT:
                raise UnavailableError(f"adapter {name!r} cannot be looked for: {error.strerror}") from error
            if not self.path.is_dir():
                raise UnavailableError(f"adapter {name!r} cannot be looked for: no adapter_root") from error
            raise NotFoundError(f"adapter {name!r} is not found") from error
        if not is_directory:
            raise NotFoundError(f"adapter {name!r} is not found")
        return directory

    def _resolve_for(self, name: str) -> Path:
        try:
            return resolve_directory(self._given, "adapter_root")
        except InvalidArgumentError as error:
            # Clients need not know where adapters lie.
            cause = error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else "no adapter_root"
            raise UnavailableError(f"adapter {name!r} cannot be looked for: {reason}") from error

    def look(self, name: str) -> Sight:
        """See which files the adapter's directory holds. Raises what `find` raises, naming the adapter."""
        directory = self.find(name)
        try:
            return look_at(directory)
        except NotFoundError as error:
            raise NotFoundError(f"adapter {name!r} is not found") from error
        except UnavailableError as error:
            raise UnavailableError(f"adapter {name!r}: {error.message}") from error
