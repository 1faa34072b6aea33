"""What others wait while one client sends long requests without end, beside what they wait without it.

Some clients ask for 16 tokens again and again; one more sends, one after the other, requests of one kind that
are as large as they can be. Phases without and with it alternate; each row has the worst wait of either.

    python bench/long_chats.py --save
"""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from manylora.serve.background import RunningServer, running_server
from manylora_client import Client

from bench.arguments import add_base_model, add_save, make_parser
from bench.loadtest.csv_file import append_csv
from bench.loadtest.origin import Origin
from bench.paths import RESULTS

PROMPT = "Once upon a time there was a small dragon who"
NUM_TOKENS = 16
NUM_OTHERS = 2
MOST_TIMES = 3.0
"""The goal: so many times the worst wait without it."""
TIMEOUT_S = 300.0


def _chat(messages: list[dict[str, object]]) -> bytes:
    return json.dumps({"text_input": json.dumps(messages), "chat": True}).encode()


def _empty_messages(count: int) -> bytes:
    return _chat([{"role": "user", "content": ""}] * count)


def _path(kind: str) -> str:
    """Only `/infer` takes a batch."""
    return "/v2/models/llm/" + ("infer" if kind.startswith("64 sequences") else "generate")


def _infer(**inputs: list[str]) -> bytes:
    tensors = [
        {"name": name, "datatype": "BYTES", "shape": [len(rows), 1], "data": rows}
        for name, rows in inputs.items()
    ]
    return json.dumps({"inputs": tensors}).encode()


def _batch(parameters: dict[str, object]) -> bytes:
    """The last sequence asks for what is not allowed, so that none runs."""
    rows = [json.dumps(parameters, separators=(",", ":"))] * 63
    wrong = json.dumps({**parameters, "top_k": -1}, separators=(",", ":"))
    return _infer(text_input=["x"] * 64, sampling_parameters=[*rows, wrong])


KINDS: dict[str, Callable[[], bytes]] = {
    "1,000,000 empty messages": lambda: _empty_messages(1_000_000),
    "a role of 16 MB": lambda: _chat([{"role": "r" * 16_000_000, "content": "x"}]),
    "250,000 empty messages, below the limit of bytes": lambda: _empty_messages(250_000),
    "8,000 messages, below all limits but that of tokens": lambda: _empty_messages(8000),
    "600,000 characters in one message": lambda: _chat([{"role": "user", "content": "long " * 120_000}]),
    "600,000 characters without chat": lambda: json.dumps({"text_input": "long " * 120_000}).encode(),
    "64 sequences with 63 KB of empty lists as parameters": lambda: _batch({"triton_x": [[]] * 21_000}),
    "64 sequences with 16 stop strings of 256 characters": lambda: _batch(
        {"stop": [f"{i:02}" + "a" * 254 for i in range(16)]}
    ),
}
"""Requests, all of which are refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Origin):
    """One kind, as bench/results/long_chats.csv keeps it."""

    kind: str
    body_bytes: int
    num_sent: int
    """Requests of this kind that were answered while it was measured."""
    num_answers: int
    num_answers_beside: int
    worst_s: float
    """Of the others without it."""
    worst_beside_s: float
    """Of the others while it is sent."""


@dataclass(slots=True)
class Waits:
    """Of some phases."""

    seconds: list[float] = field(default_factory=list)

    @property
    def worst_s(self) -> float:
        return max(self.seconds)


def ask(server: RunningServer, duration_s: float, waits: Waits) -> None:
    """Be the others for a while.

    Raises:
        ManyloraClientError: an answer failed.
        AssertionError: an answer is not the first one.
    """
    failures: list[BaseException] = []
    with Client(server.grpc, "grpc", timeout=TIMEOUT_S) as client:
        right = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True).token_ids
        until_s = time.monotonic() + duration_s

        def one() -> None:
            try:
                while (began_s := time.monotonic()) < until_s:
                    found = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True).token_ids
                    waits.seconds.append(time.monotonic() - began_s)
                    assert found == right, f"{found} is not {right}"
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one) for _ in range(NUM_OTHERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


@contextmanager
def sending(server: RunningServer, path: str, body: bytes) -> Iterator[list[int]]:
    """Post a body again and again. Yields the answers' statuses."""
    statuses: list[int] = []
    ended = threading.Event()

    def send() -> None:
        connection = http.client.HTTPConnection(server.http, timeout=TIMEOUT_S)
        while not ended.is_set():
            connection.request("POST", path, body)
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
        connection.close()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        thread.join()


def measure(server: RunningServer, kind: str, phase_s: float, num_phases: int, origin: Origin) -> Row:
    """One row.

    Raises:
        AssertionError: a request of this kind was served, or one of the others answered wrongly.
    """
    body = KINDS[kind]()
    alone, beside = Waits(), Waits()
    num_sent = 0
    for _ in range(num_phases):
        ask(server, phase_s, alone)
        with sending(server, _path(kind), body) as statuses:
            ask(server, phase_s, beside)
        assert set(statuses) <= {400}, f"{kind}: answered with {set(statuses)}"
        num_sent += len(statuses)
    return Row(
        **asdict(origin),
        kind=kind,
        body_bytes=len(body),
        num_sent=num_sent,
        num_answers=len(alone.seconds),
        num_answers_beside=len(beside.seconds),
        worst_s=alone.worst_s,
        worst_beside_s=beside.worst_s,
    )


def main() -> int:
    """Measure every kind.

    Returns: 1 if a worst wait is more than `MOST_TIMES` that without.
    """
    parser = make_parser(__doc__)
    add_base_model(parser)
    parser.add_argument("--phase-s", type=float, default=20.0, metavar="S", help="seconds of a phase")
    parser.add_argument("--phases", type=int, default=2, metavar="N", help="phases of each sort and kind")
    add_save(parser, "long_chats")
    options = parser.parse_args()
    origin = Origin.now("long chats")
    rows = []
    with (
        tempfile.TemporaryDirectory() as adapters,
        running_server(base_model=options.base_model, adapter_root=Path(adapters)) as server,
    ):
        ask(server, options.phase_s, Waits())  # the first requests of a server wait for what it does once
        for kind in KINDS:
            rows.append(measure(server, kind, options.phase_s, options.phases, origin))
            row = rows[-1]
            print(
                f"{kind}: others wait {row.worst_beside_s:.2f} s at worst, {row.worst_s:.2f} s without "
                f"({row.worst_beside_s / row.worst_s:.1f} times); {row.num_sent} sent",
                flush=True,
            )
    if options.save:
        append_csv(RESULTS / "long_chats.csv", rows)
    late = [row.kind for row in rows if row.worst_beside_s > MOST_TIMES * row.worst_s]
    for kind in late:
        print(f"more than {MOST_TIMES:g} times: {kind}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
