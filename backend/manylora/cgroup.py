"""What the kernel's control groups allow this process: processor time and memory, of version 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_NO_LIMIT_BYTES = 1 << 60
"""Version 1 writes a number near 2^63 where there is no limit."""


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors whose time this process's groups may use, or None without a limit.

    Args:
        root: where `proc` and `sys` lie; for tests.
    """
    found = []
    for folder in _groups("cpu", root):
        words = _words(folder / "cpu.max")
        if not words:
            words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        # "max" in version 2, -1 in version 1: no limit.
        if len(words) == 2 and words[0].isdecimal() and int(words[0]) and words[1].isdecimal():
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that this process's groups may hold, or None without a limit."""
    found = []
    for folder in _groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0].isdecimal() and int(words[0]) < _NO_LIMIT_BYTES:
                found.append(int(words[0]))
    return min(found, default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's group and of those above it, in each hierarchy that may have the controller.

    A container may see the host's path of its group and a mount that begins at the group itself.
    """
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (number == "0" and not names) or controller in names.split(","):
            paths["cgroup" if names else "cgroup2"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        # ID, parent, device, root of the mount, mount point, options ... - type, source, options of the whole
        left, _, right = line.partition(" - ")
        mount, about = left.split(), right.split()
        if len(mount) < 5 or len(about) < 3 or about[0] not in paths:
            continue
        if about[0] == "cgroup" and controller not in about[2].split(","):
            continue
        top = root / mount[4].lstrip("/")
        inner = Path(paths[about[0]])
        if inner.is_relative_to(mount[3]):
            inner = inner.relative_to(mount[3])
        folder = top / str(inner).lstrip("/")
        yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return (_lines(path) or [""])[0].split()
