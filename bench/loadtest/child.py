"""A process that answers for one target: `python -m loadtest.child`, started by child_target.py.

Its stdin is a socket. The first message says how the target is made; then come calls, and each is answered
with `progress` as often as the target likes and one `result` or `error`. None as a call ends it.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from manylora.errors import ManyloraError
from transformers.utils import logging as transformers_logging

from bench.loadtest.driver import TargetError
from bench.loadtest.target import Reference

EXPECTED = (ManyloraError, TargetError, ValueError, OSError)
"""Errors whose text says all; of others the traceback is wanted."""


def main() -> None:
    """Make the target and answer calls until told to end."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    connection = Connection(sys.stdin.fileno())
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # A thread, since a call may take minutes, and the process is not to outlive the one that asks.
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    target: Reference | None = None
    try:
        # Read here and not by the thread: what a message names is imported then, and that may fail.
        target = pickle.loads(inbox.get())()
        connection.send(("result", None))
        while (call := pickle.loads(inbox.get())) is not None:
            connection.send(("result", _answer(connection, target, call)))
    except Exception as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exc()
        connection.send(("error", str(error) or type(error).__name__))
    finally:
        if target is not None:
            target.close()


def _answer(connection: Connection, target: Reference, call: tuple[str, tuple[object, ...]]) -> object:
    name, arguments = call
    if name == "run":
        arguments = (*arguments, lambda: connection.send(("progress", None)))
    return getattr(target, name)(*arguments)


def _listen(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            # Nobody waits for an answer any more.
            os._exit(1)


if __name__ == "__main__":
    main()
