"""The TCP ports that a server listens on."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from manylora.errors import UnavailableError

MAX_CHOICES = 20
"""Attempts at a free port for a 0; a chosen one may be taken before it is used."""
EVERY_INTERFACE = ("0.0.0.0", "::")
"""Addresses that conflict with every other one on the same port."""
GATE_PAUSE_S = 0.01
"""Between two attempts to enter the gate of a port."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """Where tritonserver listens; 0 is a free port of the system's choice."""

    host: str
    http: int
    grpc: int
    metrics: int

    def address(self, port: int) -> str:
        """How a client on this machine reaches a port."""
        # The addresses that stand for "every interface" are not ones to connect to.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def hold(asked: Ports) -> Iterator[Ports]:
    """Choose free ports for those that are 0, and keep all three for one server while the block runs.

    tritonserver itself listens on them only when its models are loaded.

    Raises:
        UnavailableError: a port is in use, or the host is not an address of this machine.
    """
    chosen: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        for name in ("http", "grpc", "metrics"):
            port = getattr(asked, name)
            try:
                for other in (other for other, taken in chosen.items() if taken == port):
                    raise OSError(errno.EADDRINUSE, f"Address already in use (by --{other}-port)")
                chosen[name] = _hold_port(held, asked.host, port) if port else _hold_any(held, asked.host)
            except OSError as error:
                raise UnavailableError(
                    f"--{name}-port {port} on {asked.host}: {error.strerror or error}; "
                    "give another port, or 0 for a free one"
                ) from error
        yield Ports(host=asked.host, **chosen)


def _hold_any(held: contextlib.ExitStack, host: str) -> int:
    for choice in range(MAX_CHOICES):
        try:
            return _hold_port(held, host, 0)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or choice == MAX_CHOICES - 1:
                raise
    raise AssertionError


def _hold_port(held: contextlib.ExitStack, host: str, port: int) -> int:
    """Reserve one port for a tritonserver of this process.

    Raises:
        OSError: somebody else has it.
    """
    with contextlib.ExitStack() as fresh:
        bound = fresh.enter_context(_bind(host, port))
        port = bound.getsockname()[1]
        # Two such sockets do not conflict, so another `manylora serve` would find the port free.
        address = bound.getsockname()[0]
        with _gate(port):
            if any(_conflict(address, other) for other in _claims(port)):
                raise OSError(errno.EADDRINUSE, "Address already in use (another `manylora serve` has it)")
            fresh.enter_context(_named(f"{port}-{address}"))
        held.push(fresh.pop_all())
    return port


def _named(name: str) -> socket.socket:
    """Hold a name in Linux's abstract namespace, which ends with this process, and is one network's.

    Raises:
        OSError: it is held already.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        held.bind(f"\0manylora-port-{name}")
    except BaseException:
        held.close()
        raise
    return held


@contextlib.contextmanager
def _gate(port: int) -> Iterator[None]:
    """Exclusive right to claim a port: of two that claim it at once, the second sees the first one's
    claim."""
    while True:
        try:
            gate = _named(f"{port}-gate")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            time.sleep(GATE_PAUSE_S)
        else:
            break
    with gate:
        yield


def _claims(port: int) -> list[str]:
    """The addresses on which servers hold a port, from the names of their sockets."""
    begin = f"@manylora-port-{port}-"
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    names = [line.split(maxsplit=7)[-1] for line in lines]
    found = [name.removeprefix(begin) for name in names if name.startswith(begin)]
    return [address for address in found if address != "gate"]


def _conflict(one: str, other: str) -> bool:
    return one == other or one in EVERY_INTERFACE or other in EVERY_INTERFACE


def _bind(host: str, port: int) -> socket.socket:
    """A socket that keeps the port without listening: the system gives it to nobody as a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # As tritonserver does, which can listen beside it: only a listener is an obstacle, connections of an
        # earlier server that linger are none.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound
