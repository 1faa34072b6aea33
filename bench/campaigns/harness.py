"""What campaigns and server tests share: clients of the running server, its state, and what PEFT says."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import peft
import torch
import transformers
from manylora import run_dir
from manylora.ipc import query_status
from manylora.messages import Status
from manylora.serve.background import RunningServer
from manylora_client import Client
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from bench.paths import ROOT

TRAINED = sorted(path.name for path in (ROOT / "examples" / "adapters").iterdir())
SYNTHETIC = [f"synthetic-{seed:03}" for seed in range(8)]
PROMPTS = (
    "The sea is",
    "Once upon a time there was a small dragon who",
    "def fibonacci(n):",
    "The three most important things in life are",
    "In 1969, the first man on the Moon said: \"That's one small",
    "Recipe for bread: take flour, water,",
)
VERSIONS = [torch.__version__, transformers.__version__, peft.__version__]
"""What PEFT's answers depend on, besides the files."""
DONE_S = 300
"""Longest that anything may take."""
TIE = 1e-3
"""Difference of two float32 logits below which either may win."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def silence_libraries() -> None:
    """Leave the console to a campaign: no progress of loading, no warning that says nothing of it."""
    disable_progress_bar()
    # peft 0.21 asks transformers 5.23 for an attribute that has a new name.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)


def connect(server: RunningServer, protocol: Literal["http", "grpc"] = "http") -> Client:
    return Client(server.http if protocol == "http" else server.grpc, protocol, timeout=DONE_S)


def status_of(server: RunningServer) -> Status:
    return query_status(run_dir.socket_path(server.run_dir, "llm"), timeout_s=60)


def wait_idle(server: RunningServer) -> Status:
    """Wait until no sequence runs or waits. Each question takes a turn of the engine, so none is missed."""
    deadline = time.monotonic() + DONE_S
    while time.monotonic() < deadline:
        status = status_of(server)
        if status.gauges["running"] == status.gauges["waiting"] == 0:
            return status
    raise AssertionError(f"still busy after {DONE_S} s: {status.gauges}")


def at_once(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call `work` for every item, each in a thread of its own that starts when all are there."""
    gate = threading.Barrier(len(items))

    def enter(item: Item) -> Result:
        gate.wait(DONE_S)
        return work(item)

    with ThreadPoolExecutor(len(items)) as pool:
        return [done.result(DONE_S) for done in [pool.submit(enter, item) for item in items]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """PEFT's greedy answer to one prompt."""

    token_ids: list[int]
    gaps: list[float]
    """For each id, by how much its logit led the second best."""

    def start(self, num_tokens: int) -> Wanted:
        """The answer as it is with a lower `max_tokens`."""
        return Wanted(self.token_ids[:num_tokens], self.gaps[:num_tokens])

    def is_tie(self, token_ids: Sequence[int]) -> bool:
        """Compare another answer with this one: False if it is the same, True if they part at a tie.

        A tie is where PEFT's own two best logits are so close that the order of additions decides.

        Raises:
            AssertionError: the answer differs, and not at a tie.
        """
        for place, (found, wanted) in enumerate(itertools.zip_longest(token_ids, self.token_ids)):
            if found != wanted:
                gap = self.gaps[place] if place < len(self.gaps) else float("inf")
                assert gap < TIE, f"at {place}, led by {gap}: {list(token_ids)} is not {self.token_ids}"
                return True
        return False


class Peft:
    """PEFT's answers on the same base model in float32, one prompt and one adapter at a time.

    They take minutes, so they are kept from run to run, by the content of all that they depend on.
    """

    def __init__(self, base_model: Path, adapter_root: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base_model)
        self._base_model = base_model
        self._adapter_root = adapter_root
        self._cache = ROOT / ".build" / "peft_answers"
        self._cache.mkdir(exist_ok=True)
        self._base_hash = _content_hash(base_model)
        self._loaded: tuple[str, Any] | None = None

    def answers(self, adapter_id: str, prompts: Iterable[Sequence[int]], max_tokens: int) -> list[Wanted]:
        """One answer for each prompt, given as token ids."""
        adapter = _content_hash(self._adapter_root / adapter_id) if adapter_id else ""
        found = []
        for prompt in prompts:
            key = json.dumps([VERSIONS, self._base_hash, adapter, list(prompt), max_tokens])
            path = self._cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
            if not path.exists():
                wanted = self._generate(adapter_id, prompt, max_tokens)
                path.with_suffix(".new").write_text(json.dumps([wanted.token_ids, wanted.gaps]))
                path.with_suffix(".new").replace(path)
            found.append(Wanted(*json.loads(path.read_text())))
        return found

    def _generate(self, adapter_id: str, prompt: Sequence[int], max_tokens: int) -> Wanted:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self._with_adapter(adapter_id).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        best = [logits[0].topk(2).values for logits in out.logits]
        return Wanted(out.sequences[0, len(prompt) :].tolist(), [float(two[0] - two[1]) for two in best])

    def _with_adapter(self, adapter_id: str) -> Any:
        # Loaded anew for each adapter, so that none leaves anything behind for the next.
        if self._loaded is None or self._loaded[0] != adapter_id:
            model = AutoModelForCausalLM.from_pretrained(self._base_model, dtype=torch.float32)
            if adapter_id:
                model = PeftModel.from_pretrained(model, str(self._adapter_root / adapter_id))
            self._loaded = adapter_id, model.eval()
        return self._loaded[1]


def _content_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(path.name.encode())
        with path.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()
