"""Paths as settings, messages and other processes carry them: UTF-8 text.

Not every process uses UTF-8 for file names. The interpreter inside a Triton stub always uses ASCII, whatever
the locale, and cannot open a name with an `ü` that it is given as text.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from manylora.errors import InvalidArgumentError

SHARED_MEMORY = Path("/dev/shm")
"""Where tritonserver makes the files in which requests and replies pass between it and a front end."""


def from_text(text: str) -> Path:
    """The path of a text that is UTF-8 everywhere, as this process names it."""
    return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))


def to_text(path: Path | str) -> str:
    """The inverse of `from_text`. Bytes that are no UTF-8 become lone surrogates."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def readable_directory(path: Path) -> Iterator[Path]:
    """A name of the directory that every library can take, for as long as the block runs.

    Some encode it as UTF-8 themselves, which fails where the interpreter has no better name than surrogates.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield Path(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
    else:
        yield path


def checked_text(path: Path | str, what: str) -> str:
    """The text of a path that a configuration file is to hold.

    Raises:
        InvalidArgumentError: it is not UTF-8, so no text that Triton reads can name it.
    """
    text = to_text(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(
            f"{what}={text!r}: its name is not UTF-8, which Triton's configuration must be; rename or link it"
        ) from None
    return text
