"""Rows in CSV files: a dataclass for each file, whose fields are its columns."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

RowT = TypeVar("RowT")


def append_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write rows of one class at the end of a CSV file, which is made if need be.

    Floats are kept to five digits; None is an empty cell.

    Raises:
        ValueError: the file has other columns.
    """
    if not rows:
        return
    names = _columns(type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        _check_header(path, names)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(names)
        for row in rows:
            values = [getattr(row, name) for name in names]
            writer.writerow([f"{v:.5g}" if isinstance(v, float) else "" if v is None else v for v in values])


def read_csv(path: Path, row_type: type[RowT]) -> list[RowT]:
    """Read rows that `append_csv` wrote.

    Raises:
        ValueError: the file has other columns, or a cell is no number where one belongs.
    """
    _check_header(path, _columns(row_type))
    with path.open(newline="") as file:
        return [_read(line, row_type) for line in csv.DictReader(file)]


def _columns(row_type: type) -> list[str]:
    return [field.name for field in fields(row_type)]


def _check_header(path: Path, names: list[str]) -> None:
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if found != names:
        raise ValueError(f"{path} has the columns {','.join(found)}; expected {','.join(names)}")


def _read(line: dict[str, str], row_type: type[RowT]) -> RowT:
    values: dict[str, object] = {}
    for field in fields(row_type):  # type: ignore[arg-type]  # a dataclass
        text, kind = line[field.name], str(field.type)
        if kind == "str":
            values[field.name] = text
        elif text == "" and "None" in kind:
            values[field.name] = None
        else:
            values[field.name] = int(text) if kind.startswith("int") else float(text)
    return row_type(**values)
