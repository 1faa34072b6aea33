"""Tables and sizes for terminals."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def render(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Lines of columns as wide as their widest cell, two spaces apart.

    Args:
        right: columns, by number, that are set to the right.
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(columns(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - columns(cell))
            parts.append(space + cell if i in right else cell + space)
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese characters two, accents on their own none."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def cut(text: str, width: int) -> str:
    """The text, cut to so many columns and `...` where it takes more."""
    if columns(text) <= width:
        return text
    while columns(text) > width - 3:
        text = text[:-1]
    return f"{text}..."


def fill(parts: Sequence[str], width: int) -> list[str]:
    """At least one line, of whole parts two spaces apart, not wider than `width` unless one part alone is."""
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}  {part}" if lines[-1] else part
        if lines[-1] and columns(longer) > width:
            lines.append(part)
        else:
            lines[-1] = longer
    return lines


def size(num_bytes: float) -> str:
    """`12.3 MiB`: three digits or so, in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
