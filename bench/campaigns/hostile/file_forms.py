"""What a file of an adapter can be instead of a regular one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
HUGE_BYTES = 1 << 40
"""Size of a file with a hole."""


def _absent(path: Path) -> None:
    path.unlink()


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _socket(path: Path) -> None:
    path.unlink()
    # A socket's path must be short: bound where it is, from its own directory.
    with socket.socket(socket.AF_UNIX) as bound:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            bound.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)


def _hole(path: Path) -> None:
    os.truncate(path, HUGE_BYTES)


def _closed(path: Path) -> None:
    path.chmod(0)


def _linked(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target.format(name=path.name))

    return link


FILES: dict[str, Callable[[Path], None]] = {
    "absent": _absent,
    "directory": _directory,
    "pipe": _pipe,
    "socket": _socket,
    "hole": _hole,
    "closed": _closed,
    "link to itself": _linked("{name}"),
    "link to nothing": _linked("nothing"),
    "link to its directory": _linked("."),
    "link to zeros": _linked("/dev/zero"),
    "link to the terminal": _linked("/dev/tty"),
    "link to memory": _linked("/proc/self/mem"),
    "link to a list of processes": _linked("/proc"),
    "link to the other file": lambda path: _linked(WEIGHTS_NAME if path.name == CONFIG_NAME else CONFIG_NAME)(
        path
    ),
}
