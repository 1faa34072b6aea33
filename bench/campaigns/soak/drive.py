"""Drives a soak: some clients, each asking one thing after the other, and what became of each."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from manylora.serve.background import RunningServer
from manylora_client import (
    Client,
    ConnectionFailed,
    InvalidArgument,
    ManyloraClientError,
    NotFound,
    Timeout,
    Unavailable,
)

from bench.campaigns.harness import DONE_S, Wanted, connect

from .plan import MAX_TOKENS, Operation, Plan

Answers = Mapping[tuple[str, str], Wanted]
"""By adapter and prompt."""


@dataclass(slots=True)
class Result:
    """What a soak has met."""

    ends: dict[str, Counter[str]] = field(default_factory=dict)
    """How operations ended, by kind."""
    faults: list[str] = field(default_factory=list)
    num_compared: int = 0
    """Greedy answers held against PEFT's."""
    num_ties: int = 0
    """Of these, those that part from it where its two best logits are equal."""
    num_repeats: int = 0
    """Sampled answers held against an earlier one to the same request."""
    num_changed: int = 0
    """Of these, those that differ."""

    @property
    def num_operations(self) -> int:
        return sum(counts.total() for counts in self.ends.values())


class Soak:
    """One run of a plan."""

    def __init__(
        self,
        server: RunningServer,
        plan: Plan,
        answers: Answers,
        on_done: Callable[[], Any] = lambda: None,
    ) -> None:
        """
        Args:
            answers: of MAX_TOKENS tokens, for each adapter and prompt of the plan.
            on_done: called after each operation.
        """
        self._server = server
        self._plan = plan
        self._answers = answers
        self._on_done = on_done
        self._lock = threading.Lock()
        self._result = Result()
        self._sampled: dict[tuple[object, ...], list[int]] = {}
        self.num_done = 0

    def run(self, num_operations: int, num_clients: int) -> Result:
        """Ask everything; return when all of it has ended."""
        numbers = iter(range(num_operations))
        take = threading.Lock()

        def work() -> None:
            with connect(self._server, "http") as http, connect(self._server, "grpc") as grpc:
                clients = {"http": http, "grpc": grpc}
                while True:
                    with take:
                        index = next(numbers, None)
                    if index is None:
                        return
                    operation = self._plan.operation(index)
                    self._note(operation, *self._ask(clients[operation.protocol], operation))

        with ThreadPoolExecutor(num_clients) as pool:
            for done in [pool.submit(work) for _ in range(num_clients)]:
                done.result()
        return self._result

    def _note(self, operation: Operation, end: str, fault: str) -> None:
        with self._lock:
            self.num_done += 1
            self._result.ends.setdefault(operation.kind, Counter())[end] += 1
            if fault:
                self._result.faults.append(f"{operation}: {fault}")
            self._on_done()

    def _ask(self, client: Client, operation: Operation) -> tuple[str, str]:
        """Ask, and judge the answer.

        Returns: how it ended, and what is wrong with that, if anything is.
        """
        try:
            token_ids = _send(client, operation)
        except ManyloraClientError as error:
            return type(error).__name__, _judge_error(operation, error)
        except Exception as error:
            return "broken", repr(error)
        if token_ids is None:
            return "left", ""
        return "answered", self._judge_answer(operation, token_ids)

    def _judge_answer(self, operation: Operation, token_ids: list[int]) -> str:
        if operation.kind in ("invalid", "unknown adapter"):
            return "served, and should not be"
        if operation.kind == "sampled":
            key = (operation.adapter_id, operation.prompt, operation.parameters["seed"])
            with self._lock:
                first = self._sampled.setdefault(key, token_ids)
                self._result.num_repeats += first is not token_ids
                self._result.num_changed += first != token_ids
            return ""
        wanted = self._answers[operation.adapter_id, operation.prompt].start(operation.max_tokens)
        if operation.max_tokens > MAX_TOKENS:
            # Longer than what is known.
            token_ids = token_ids[:MAX_TOKENS]
        try:
            is_tie = wanted.is_tie(token_ids)
        except AssertionError as error:
            return f"wrong answer: {error}"
        with self._lock:
            self._result.num_compared += 1
            self._result.num_ties += is_tie
        return ""


def _send(client: Client, operation: Operation) -> list[int] | None:
    """The answer's ids; None where the client left before the end."""
    asked: dict[str, Any] = {
        "adapter_id": operation.adapter_id,
        "max_tokens": operation.max_tokens,
        "timeout": operation.timeout_s or DONE_S,
        **operation.parameters,
    }
    if not operation.is_stream:
        return client.generate(operation.prompt, **asked).token_ids
    stream = client.stream(operation.prompt, **asked)
    if operation.kind != "streamed away":
        return stream.collect().token_ids
    for _ in itertools.islice(stream, operation.leave_after):
        pass
    stream.close()
    return None


def _judge_error(operation: Operation, error: ManyloraClientError) -> str:
    allowed: dict[str, type[ManyloraClientError]] = {
        "invalid": InvalidArgument,
        "unknown adapter": NotFound,
        "timed out": Timeout,
        "with a deadline": Unavailable,
    }
    if isinstance(error, allowed.get(operation.kind, ())):
        return ""
    lost = "lost: " if isinstance(error, Timeout | ConnectionFailed) else ""
    return f"{lost}{type(error).__name__}: {error.message}"
