"""Schedule and finish steps in a process that cannot import torch, and print what came out as JSON.

    python decide_without_torch.py ADAPTER_ROOT

`ADAPTER_ROOT` has the adapters `a` and `b`. A program of its own, since tests import torch; whoever runs it
blocks that.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.adapter_root import AdapterRoot
from manylora.adapters.device_pool import DevicePool
from manylora.adapters.placement import Placement
from manylora.adapters.registry import Registry
from manylora.config import EngineConfig
from manylora.engine.kv_cache import BlockPool
from manylora.engine.limits import Limits
from manylora.engine.requests import Requests
from manylora.engine.schedule import build_step
from manylora.engine.scheduler import Scheduler
from manylora.engine.sequence import Sequence
from manylora.engine.session import Session
from manylora.engine.step import NewTokens, StepResult
from manylora.messages import SamplingParams
from manylora.model.spec import SiteKind, page_groups

KINDS = (SiteKind(name="q", num_layers=1, in_features=4, out_features=(4,)),)
EOS = 2


@dataclass
class Weights:
    """What the registry and the pool ask of an adapter's."""

    version: str
    scale: float = 2.0
    max_rank: int = 16
    num_bytes: int = 256
    num_pages: tuple[int, ...] = (1, *(0 for _ in page_groups(KINDS)[1:]))


class Commands:
    """Where a pool's tensors would be: notes what they are told."""

    num_bytes = 0

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def place(self, placement: Placement, weights: Weights) -> None:
        assert placement.version == weights.version
        self.notes.append(("place", placement.version))

    def free(self, placement: Placement) -> None:
        self.notes.append(("free", placement.version))

    def is_copied(self, placement: Placement) -> bool:
        return True

    def await_copy(self, placement: Placement) -> None:
        pass


def main() -> None:
    assert sys.modules.get("torch", sys) is None, "torch is not blocked"
    config = EngineConfig(
        base_model="none",
        adapter_root=sys.argv[1],
        max_loras=1,
        max_lora_rank=16,
        max_cpu_loras=2,
        adapter_settle_s=0.0,
    )
    commands, woken = Commands(), threading.Event()
    pool = DevicePool(KINDS, 1, 16, commands)
    root = AdapterRoot(config.adapter_root)

    def read(directory: Path) -> Weights:
        return Weights(directory.name)

    registry = Registry(config, root, read, pool, woken.set)
    limits = Limits(
        max_loras=1,
        max_num_seqs=4,
        max_batched_tokens=8,
        max_waiting=9,
        max_model_len=64,
        max_passes=4,
    )
    blocks = BlockPool(16, 4)
    scheduler = Scheduler(limits, blocks, registry, [EOS])
    requests, events = Requests(), []
    session = Session(lambda message: None, events.extend)
    for number, name in enumerate(["", "a", "b", "a"]):
        sequence = Sequence(
            id=100 + number,
            request_id=number,
            token_ids=[5 + number] * (3 + number),
            num_prompt=3 + number,
            params=SamplingParams(max_tokens=3, temperature=float(number % 2), seed=1, logprobs=number),
            seed=1,
            lease=registry.acquire(name) if name else None,
            adapter_id=name,
        )
        requests.add(session, sequence)
        scheduler.add(sequence)
    num_steps, largest = 0, 0
    while scheduler.waiting or scheduler.running:
        woken.clear()
        registry.poll()
        schedule = scheduler.schedule()
        if schedule is None:
            assert woken.wait(60)
            continue
        step = build_step(schedule, blocks.block_size, scheduler.endings.eos_token_ids)
        largest = max(largest, len(pickle.dumps(step)))
        given = [NewTokens([9])] * step.sampling.num_rows
        for sequence, tokens in scheduler.finish(schedule, StepResult(step.number, given)):
            requests.session_of(sequence.id).events.append(tokens)
            if tokens.finish_reason:
                requests.remove(sequence)
                if sequence.lease is not None:
                    registry.release(sequence.lease)
        num_steps += 1
        session.flush()
        wrong = scheduler.check() + registry.check() + pool.check() + requests.check()
        assert wrong == [], wrong
    registry.close()
    ends = {event.id: event.adapter_version for event in events if event.finish_reason == "length"}
    print(json.dumps({"steps": num_steps, "ends": ends, "told": commands.notes, "bytes": largest}))


if __name__ == "__main__":
    main()
