"""Runs the grammar's cases against a server and gathers what is wrong."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from manylora.serve.background import RunningServer

from bench.campaigns.harness import PROMPTS, Peft, Wanted
from bench.campaigns.server_state import main_processes, server_faults

from . import http_wire
from .case import Asked, Case, GrpcCall, Known, Outcome
from .grammar import MAX_KNOWN_TOKENS
from .grpc_wire import GrpcWire
from .judge import SPREADS, find_faults
from .request import Request, as_grpc, as_infer_json, text_tensor
from .values import MAX_MODEL_LEN

SETTINGS = (f"--set=max_model_len={MAX_MODEL_LEN}", "--set=max_loras=4", "--set=max_cpu_loras=8")
"""Of the server that the cases are made for."""
END_S = 300.0
"""Longest wait for a request's next sign of life."""
NUM_CLIENTS = 16


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with one case."""

    case: Case
    what: str


@dataclass(slots=True)
class Result:
    """What a campaign has met."""

    num_cases: Counter[str] = field(default_factory=Counter)
    """By production."""
    ends: dict[str, Counter[str]] = field(default_factory=dict)
    """How they ended, by production."""
    faults: list[Fault] = field(default_factory=list)
    server_faults: list[str] = field(default_factory=list)


def known_answers(peft: Peft, adapter_ids: Sequence[str]) -> tuple[list[tuple[str, str]], list[Wanted]]:
    """Adapter and prompt of each answer that is known, and the answers."""
    prompts: list[tuple[str, str]] = []
    answers: list[Wanted] = []
    for adapter_id in ("", *adapter_ids):
        ids = [peft.tokenizer(text)["input_ids"] for text in PROMPTS[:3]]
        prompts += [(adapter_id, text) for text in PROMPTS[:3]]
        answers += peft.answers(adapter_id, ids, MAX_KNOWN_TOKENS)
    return prompts, answers


def run(
    server: RunningServer,
    cases: Iterable[Case],
    answers: Sequence[Wanted],
    on_done: Callable[[], Any] = lambda: None,
) -> Result:
    """Send all cases from some clients at once, then look at the server.

    Args:
        answers: those that the grammar knows of.
        on_done: called after each case.
    """
    result = Result()
    lock = threading.Lock()
    own = threading.local()
    before = main_processes(server)
    wires: list[GrpcWire] = []

    def send(case: Case) -> None:
        if not hasattr(own, "wire"):
            own.wire = GrpcWire(server.grpc)
            wires.append(own.wire)
        try:
            outcome = (
                own.wire.send(case, END_S)
                if isinstance(case.wire, GrpcCall)
                else http_wire.send(server.http, case, END_S)
            )
            found = find_faults(case, outcome, answers)
        except Exception as error:
            outcome, found = Outcome(end="closed"), [f"an answer that cannot be read: {error!r}"]
        with lock:
            result.num_cases[case.kind] += 1
            result.ends.setdefault(case.kind, Counter())[_end(outcome)] += 1
            result.faults += [Fault(case, what) for what in found]
            on_done()

    try:
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            for done in [pool.submit(send, case) for case in cases]:
                done.result()
    finally:
        for wire in wires:
            wire.close()
    result.server_faults = server_faults(server, before)
    return result


def run_adapters(
    server: RunningServer,
    names: Sequence[str],
    prompts: Sequence[tuple[str, str]],
    answers: Sequence[Wanted],
    on_done: Callable[[], Any] = lambda: None,
) -> Result:
    """Ask for each of some mutated adapters by name, in turn with requests whose answers are known.

    Args:
        names: directories of the server's `adapter_root`.
        prompts: adapter and prompt of each known answer.
        answers: the known answers.
        on_done: called after each adapter.
    """

    def asked(index: int, adapter_id: str, text: str, num_tokens: int, what: Asked, kind: str) -> Case:
        parameters = [("max_tokens", str(num_tokens)), ("adapter_id", json.dumps(adapter_id))]
        request = Request(tensors=[text_tensor([text.encode()])], parameters=parameters)
        if index % 2:
            return Case(index=index, kind=kind, wire=as_infer_json(request), asked=(what,))
        return Case(index=index, kind=kind, wire=GrpcCall(messages=(as_grpc(request),)), asked=(what,))

    cases = []
    for index, name in enumerate(names):
        cases.append(asked(index, name, PROMPTS[0], 2, Asked(), f"adapter {name}"))
        place = index % len(prompts)
        known = Asked(expects="answer", known=(Known(place=place, num_tokens=3),))
        cases.append(asked(index, *prompts[place], 3, known, "known"))
    return run(server, cases, answers, on_done)


def _end(outcome: Outcome) -> str:
    """How a case ended, in a few words."""
    if outcome.end != "answered":
        return outcome.end
    errors = [r.error for replies in outcome.replies.values() for r in replies if r.error is not None]
    if not errors:
        return "served"
    if SPREADS.search(errors[0]):
        return "Triton's refusal of it or of another"
    tag = errors[0].partition("]")[0].lstrip("[")
    return tag if tag.isupper() and tag.replace("_", "").isalpha() else "Triton's refusal"
