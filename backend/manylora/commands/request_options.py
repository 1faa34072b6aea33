"""Options that `generate` and `chat` share: the server's address and the request's parameters."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from typing import Any

from manylora_client import Client, Options

from manylora.errors import InvalidArgumentError

DEFAULT_URL = "localhost:8000"

SETTABLE = tuple(name for name in Options.__annotations__ if name != "adapter_id")
"""Names for `--set` and `/set`: the client's request parameters. The adapter is named in other ways."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the address and the parameters of requests."""
    add = parser.add_argument
    add(
        "--url",
        default=os.environ.get("MANYLORA_URL", DEFAULT_URL),
        help="host:port, or with http://, https://, grpc://, grpcs:// (default: $MANYLORA_URL, else "
        f"{DEFAULT_URL})",
    )
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds an answer may take (default: 300)")
    for name, kind, text in (
        ("max-tokens", int, "most tokens of an answer"),
        ("temperature", float, "0 is greedy"),
        ("top-p", float, "sample among the likeliest tokens of this probability together"),
        ("top-k", int, "sample among so many of the likeliest tokens"),
        ("min-p", float, "sample among tokens at least this share as likely as the likeliest"),
        ("seed", int, "makes sampling repeatable"),
        ("adapter-scale", float, "multiplies the adapter's own scaling"),
        ("repetition-penalty", float, "above 1: less of what has been said"),
        ("deadline-ms", int, "an answer within so many milliseconds, or an error"),
    ):
        add(f"--{name}", type=kind, metavar="X", help=text)
    add("--stop", action="append", metavar="TEXT", help="ends an answer; may be given several times")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other parameter of the request; see below",
    )


def open_client(arguments: argparse.Namespace) -> Client:
    """A client for the server that was named."""
    return Client(arguments.url, timeout=arguments.timeout)


def read_parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """The request's parameters as they were given.

    Raises:
        InvalidArgumentError: a `--set` cannot be parsed, or repeats a parameter.
    """
    names = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "adapter_scale"]
    names += ["repetition_penalty", "deadline_ms", "stop"]
    found = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for text in arguments.set:
        name, value = read_setting(text)
        if name in found:
            raise InvalidArgumentError(f"--set {text!r}: {name} is given already, as {found[name]!r}")
        found[name] = value
    return found


def read_setting(text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE`; the value is JSON if it can be parsed as such, otherwise text.

    Raises:
        InvalidArgumentError: there is no `=`, or no such parameter.
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name:
        raise InvalidArgumentError(f"{text!r}: expected NAME=VALUE")
    if name not in SETTABLE:
        hint = "; --adapter or /adapter names the adapter" if name == "adapter_id" else ""
        raise InvalidArgumentError(f"{text!r}: no such parameter; known are {', '.join(SETTABLE)}{hint}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def settings_help() -> str:
    """The names for `--set`, as `--help` shows them."""
    return textwrap.fill(
        f"parameters: {', '.join(SETTABLE)}", width=80, subsequent_indent="  ", break_long_words=False
    )
