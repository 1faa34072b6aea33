"""tritonserver's interfaces for the operator: closed to every client unless they are opened by name."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from manylora.errors import InvalidArgumentError

RESTRICTABLE = ("shared-memory", "trace", "logging", "model-repository")
"""As tritonserver calls them. Through the first, clients read each other's prompts; through the others they
change how the whole server logs, traces and loads models. Inference, health, metadata, configuration and
statistics stay open: clients and perf_analyzer need them."""


def read_allowed(words: Iterable[str]) -> frozenset[str]:
    """The names of interfaces to open, each word one or several with commas.

    Raises:
        InvalidArgumentError: there is no such name.
    """
    names = [name.strip() for word in words for name in word.split(",")]
    for name in names:
        if name not in RESTRICTABLE:
            raise InvalidArgumentError(f"--allow {name!r}: allowed are {', '.join(RESTRICTABLE)}")
    return frozenset(names)


def restriction_arguments(allowed: frozenset[str]) -> list[str]:
    """The words of tritonserver's command line that close what is not in `allowed`.

    A request with a header of the right name and value is admitted, and every user of the machine can see
    both in the list of processes. So the name contains a line break, which neither tritonserver's HTTP nor
    its gRPC accepts in a name. In a value, gRPC accepts it.
    """
    closed = ",".join(name for name in RESTRICTABLE if name not in allowed)
    if not closed:
        return []
    rule = f"{closed}:closed-by-manylora\n{secrets.token_hex(16)}={secrets.token_hex(16)}\n"
    return [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]
