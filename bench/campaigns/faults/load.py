"""Clients that ask while a fault happens, and what each of them saw."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from manylora import run_dir
from manylora.ipc import query_status
from manylora.serve.background import RunningServer
from manylora_client import Client, ManyloraClientError

from bench.campaigns.faults.anatomy import DONE_S

PROMPT = "Once upon a time there was a small dragon who"
NUM_STREAMS = 32
NUM_WHOLE = 4
MAX_TOKENS = 16
RIGHT, WRONG, HUNG = "right", "WRONG", "HUNG"


@dataclass(slots=True)
class Seen:
    """What one client saw."""

    outcome: str = HUNG
    """RIGHT, WRONG, HUNG or the name of the client's exception."""
    message: str = ""
    token_ids: list[int] = field(default_factory=list)
    ended_at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What all clients saw of one fault."""

    fault: str
    seen: list[Seen]
    last_end_s: float
    """From the fault to the moment when the last client had its answer or its error."""
    recovery_s: float
    """From the fault to the next right answers; of a server that was stopped, to its last process's end."""

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(seen.outcome for seen in self.seen)

    @property
    def messages(self) -> set[str]:
        """Of the errors."""
        return {seen.message for seen in self.seen if seen.message}


class Bed:
    """A running server, and the right answers to what the load asks it."""

    def __init__(self, server: RunningServer, adapters: Sequence[str]) -> None:
        """Ask for the right answers, one by one.

        Args:
            adapters: names for the load to use in turn; the base model comes with them.
        """
        self.server = server
        self.names = ["", *adapters]
        with self.connect() as client:
            self.right = {name: self._ask(client, name) for name in self.names}

    def connect(self) -> Client:
        return Client(self.server.grpc, "grpc", timeout=DONE_S)

    def wait_right(self) -> None:
        """Ask every adapter, through both front ends, until each has given a right answer.

        Raises:
            AssertionError: an answer is wrong, or none came.
        """
        deadline = time.monotonic() + DONE_S
        with self.connect() as client:
            for name in self.names:
                for ask in (self._ask, self._collect):
                    while (found := _unless_error(lambda a=ask, n=name: a(client, n))) is None:
                        assert time.monotonic() < deadline, f"no answer in {DONE_S} s"
                        time.sleep(0.05)
                    assert found == self.right[name], f"{name or 'base model'} answers wrongly"

    def suffer(
        self, fault: str, inject: Callable[[], None], *, max_tokens: int = MAX_TOKENS, is_last: bool = False
    ) -> Report:
        """Put a fault into the server while clients are being answered, and see them and it through.

        Args:
            inject: makes the fault.
            max_tokens: of each client's answer.
            is_last: no answer is expected afterwards.
        """
        seen = [Seen() for _ in range(NUM_STREAMS + NUM_WHOLE)]
        flowing = threading.Semaphore(0)
        with self.connect() as client:
            threads = [
                threading.Thread(
                    target=self._follow, args=(client, i, max_tokens, each, flowing), daemon=True
                )
                for i, each in enumerate(seen)
            ]
            for thread in threads:
                thread.start()
            for _ in range(NUM_STREAMS):
                assert flowing.acquire(timeout=DONE_S), "the load does not flow"
            self._wait_arrived(seen)
            began = time.monotonic()
            inject()
            for thread in threads:
                thread.join(max(0.0, began + DONE_S - time.monotonic()))
        if not is_last:
            self.wait_right()
        return Report(
            fault=fault,
            seen=seen,
            last_end_s=max(each.ended_at for each in seen) - began,
            recovery_s=time.monotonic() - began,
        )

    def _wait_arrived(self, seen: Sequence[Seen]) -> None:
        """Wait until the engine has the requests without a stream, too, which nothing tells of."""
        deadline = time.monotonic() + DONE_S
        while time.monotonic() < deadline:
            gauges = query_status(run_dir.socket_path(self.server.run_dir, "llm"), timeout_s=DONE_S).gauges
            num_ended = sum(each.outcome != HUNG for each in seen)
            if gauges["running"] + gauges["waiting"] + num_ended >= len(seen):
                return
        raise AssertionError(f"requests did not arrive in {DONE_S} s: {gauges}")

    def _follow(
        self, client: Client, number: int, max_tokens: int, seen: Seen, flowing: threading.Semaphore
    ) -> None:
        """Be one client."""
        name = self.names[number % len(self.names)]
        asked = {"adapter_id": name, "max_tokens": max_tokens, "ignore_eos": True}
        told = False
        try:
            if number >= NUM_STREAMS:
                seen.token_ids = client.generate(PROMPT, **asked).token_ids
            else:
                for chunk in client.stream(PROMPT, **asked):
                    seen.token_ids += chunk.token_ids
                    if not told:
                        flowing.release()
                        told = True
            right = self.right[name]
            is_right = len(seen.token_ids) == max_tokens and seen.token_ids[: len(right)] == right
            outcome = RIGHT if is_right else WRONG
        except ManyloraClientError as error:
            outcome, seen.message = type(error).__name__, error.message
        seen.ended_at = time.monotonic()
        seen.outcome = outcome
        if not told:
            flowing.release()

    @staticmethod
    def _ask(client: Client, name: str) -> list[int]:
        return client.generate(PROMPT, adapter_id=name, max_tokens=8, ignore_eos=True, timeout=60).token_ids

    @staticmethod
    def _collect(client: Client, name: str) -> list[int]:
        asked = {"adapter_id": name, "max_tokens": 8, "ignore_eos": True, "timeout": 60}
        return client.stream(PROMPT, **asked).collect().token_ids


def _unless_error(ask: Callable[[], list[int]]) -> list[int] | None:
    try:
        return ask()
    except ManyloraClientError:
        return None
