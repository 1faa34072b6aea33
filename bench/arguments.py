"""Arguments that several commands have, and words of which they are made."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bench.paths import BASE_MODEL

ValueT = TypeVar("ValueT")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes a command by its module's docstring, with the examples in it as they are."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_base_model(parser: Any) -> None:
    """`--base-model`. `parser` may be a group of arguments."""
    parser.add_argument(
        "--base-model",
        type=Path,
        default=BASE_MODEL,
        metavar="DIR",
        help="(default: the one that `make setup` prepares)",
    )


def add_save(parser: Any, name: str, what: str = "the rows") -> None:
    """`--save`, into the file of this name."""
    parser.add_argument("--save", action="store_true", help=f"append {what} to bench/results/{name}.csv")


def parsed(parse: Callable[[str], ValueT]) -> Callable[[str], ValueT]:
    """`parse` as an argument's type: its ValueError's message is what the user reads."""

    def read(text: str) -> ValueT:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def words(text: str) -> list[str]:
    """`a,b`."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers_from(least: int) -> Callable[[str], list[int]]:
    """`1,2`: whole numbers, each `least` or more, the smallest first."""

    def numbers(text: str) -> list[int]:
        return sorted({at_least(least, word) for word in words(text)})

    return numbers


def rates(text: str) -> list[float]:
    """`0.5,1`: numbers above 0, the smallest first."""
    found = sorted({float(word) for word in words(text)})
    if not found or not 0 < found[0] <= found[-1] < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected rates above 0")
    return found


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    return at_least(1, text)


def at_least(least: int, text: str) -> int:
    """A whole number, `least` or more."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number}: must be {least} or more")
    return number


def setting(text: str) -> tuple[str, str]:
    """`KEY=VALUE`, one of the engine's settings."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    return key, value
