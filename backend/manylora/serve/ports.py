"""The TCP ports that a server listens on."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

from manylora.errors import UnavailableError


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


def resolve(asked: Ports) -> Ports:
    """Choose free ports for those that are 0, and make sure that the others are free.

    Raises:
        UnavailableError: a port is in use, or the host is not an address of this machine.
    """
    chosen = {}
    # All are held until the last one is chosen, or two of them could be the same.
    with contextlib.ExitStack() as held:
        for name in ("http", "grpc", "metrics"):
            port = getattr(asked, name)
            try:
                listener = held.enter_context(_listen(asked.host, port))
            except OSError as error:
                raise UnavailableError(
                    f"--{name}-port {port} on {asked.host}: {error.strerror or error}; "
                    "give another port, or 0 for a free one"
                ) from error
            chosen[name] = listener.getsockname()[1]
    return Ports(host=asked.host, **chosen)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # As tritonserver does: connections of an earlier server that linger are no obstacle, a listener is.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener
