"""PEFT's `generate(adapter_names=...)`: one batch after the other, each as large as what waits.

Shape key: B sequences, T tokens of the longest prompt.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.loadtest.driver import Progress
from bench.loadtest.record import Record, Round
from bench.loadtest.target import TokenIds
from bench.loadtest.workload import Case, Request


class _Stamps(BaseStreamer):
    """When the tokens of each step were there."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        # The prompt comes first.
        if self._has_prompt:
            self.times_s.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        pass


class PeftTarget:
    """The base model with all adapters in memory. A batch runs as long as its longest answer."""

    name = "peft"

    def __init__(
        self,
        base_model: Path,
        adapter_root: Path,
        adapters: Sequence[str],
        *,
        max_batch: int,
        dtype: str,
        num_threads: int,
    ) -> None:
        """Load everything.

        Args:
            max_batch: most sequences of one batch.
            dtype: `auto`, or a name of torch's.
            num_threads: of torch, for the whole process; 0: torch's own choice.
        """
        # peft 0.21 asks transformers 5.23 for an attribute that has a new name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        if num_threads:
            torch.set_num_threads(num_threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        load: Any = AutoModelForCausalLM.from_pretrained
        model: Any = load(base_model, dtype=dtype).to(device)
        for name in adapters:
            if isinstance(model, peft.PeftModel):
                model.load_adapter(str(adapter_root / name), adapter_name=name)
            else:
                model = peft.PeftModel.from_pretrained(model, str(adapter_root / name), adapter_name=name)
        self._model = model.eval()
        self._has_adapters = bool(adapters)
        self._max_batch = max_batch
        ends = self._model.generation_config.eos_token_id
        self._ends: list[int] = ends if isinstance(ends, list) else [ends] if ends is not None else []

    def run(self, case: Case, progress: Progress) -> Round:
        """See Target."""
        num_requests = len(case.requests)
        limit = min(self._max_batch, case.arrival.max_in_flight(num_requests))
        due_times = case.due_times()
        records: list[Record] = []
        begin_s = time.perf_counter()
        while len(records) < num_requests:
            first = len(records)
            time.sleep(max(0.0, begin_s + due_times[first] - time.perf_counter()))
            now_s = time.perf_counter()
            count = sum(begin_s + due <= now_s for due in due_times[first : first + limit])
            batch = case.requests[first : first + count]
            is_closed = case.arrival.num_clients > 0
            records += [
                Record(now_s if is_closed else begin_s + due, is_streamed=True)
                for due in due_times[first : first + count]
            ]
            self._run_batch(batch, records[first:])
            for _ in batch:
                progress()
        return Round(records, begin_s, {})

    def gap(self, prompt: TokenIds, adapter: str) -> float:
        """See Reference."""
        ids = torch.tensor([prompt], device=self._model.device)
        with torch.inference_mode():
            logits = self._model(input_ids=ids, **self._names([adapter])).logits[0, -1].float()
        logits[self._ends] = -torch.inf
        best = logits.topk(2).values
        return float(best[0] - best[1])

    def close(self) -> None:
        """See Reference. The memory goes with the process."""

    def _run_batch(self, batch: list[Request], records: list[Record]) -> None:
        longest = max(len(request.prompt) for request in batch)
        # A decoder's prompts are padded on the left, so that all answers begin in one column.
        padding = [longest - len(request.prompt) for request in batch]
        ids_BT = torch.tensor([[0] * pad + r.prompt for pad, r in zip(padding, batch, strict=True)])
        mask_BT = torch.tensor(
            [[0] * pad + [1] * len(r.prompt) for pad, r in zip(padding, batch, strict=True)]
        )
        num_steps = max(request.num_output for request in batch)
        stamps = _Stamps()
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids_BT.to(self._model.device),
                attention_mask=mask_BT.to(self._model.device),
                max_new_tokens=num_steps,
                min_new_tokens=num_steps,
                do_sample=False,
                streamer=stamps,
                **self._names([request.adapter for request in batch]),
            )
        for request, record, row in zip(batch, records, out[:, longest:].tolist(), strict=True):
            for at_s, token_id in zip(stamps.times_s, row[: request.num_output], strict=False):
                record.add(at_s, [token_id])

    def _names(self, adapters: list[str]) -> dict[str, list[str]]:
        return {"adapter_names": [name or "__base__" for name in adapters]} if self._has_adapters else {}
