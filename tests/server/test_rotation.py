"""A server with little room: adapters in rotation through both caches, prompts up to the limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora.serve.background import RunningServer, running_server
from manylora_client import InvalidArgument

from bench.campaigns.harness import PROMPTS, Peft, at_once, connect, wait_idle

ADAPTERS = [f"synthetic-{seed:03}" for seed in range(12)]
NUM_CLIENTS = 16
NUM_TURNS = 6
MAX_TOKENS = 8
MAX_MODEL_LEN = 64


@pytest.fixture(scope="module")
def tight_server(small_model: Path, small_root: Path) -> Iterator[RunningServer]:
    """Room for 2 adapters in a step and 4 in host memory."""
    settings = ["--set=max_loras=2", "--set=max_cpu_loras=4", f"--set=max_model_len={MAX_MODEL_LEN}"]
    with running_server(base_model=small_model, adapter_root=small_root, arguments=settings) as running:
        yield running


def test_12_adapters_rotate_through_2_and_4_places(
    tight_server: RunningServer, small_model: Path, small_root: Path
):
    peft = Peft(small_model, small_root)
    prompts = [list(peft.tokenizer(text)["input_ids"]) for text in PROMPTS[:2]]
    wanted = {name: peft.answers(name, prompts, MAX_TOKENS) for name in ADAPTERS}
    assert len(wanted) == 12

    def take_turns(number: int) -> int:
        num_ties = 0
        for turn in range(NUM_TURNS):
            name = ADAPTERS[(5 * number + 7 * turn) % len(ADAPTERS)]
            which = (number + turn) % len(prompts)
            found = client.generate(input_ids=prompts[which], adapter_id=name, max_tokens=MAX_TOKENS)
            num_ties += wanted[name][which].is_tie(found.token_ids)
        return num_ties

    with connect(tight_server, "grpc") as client:
        num_ties = sum(at_once(take_turns, range(NUM_CLIENTS)))
    print(f"{num_ties} ties in {NUM_CLIENTS * NUM_TURNS} sequences")
    assert num_ties <= 0.01 * NUM_CLIENTS * NUM_TURNS

    status = wait_idle(tight_server)
    assert status.check_errors == []
    assert status.counters["host_evictions"] > 0
    assert status.counters["device_evictions"] > 0
    assert status.counters["failed"] == 0
    assert status.gauges["host_adapters"] <= 4
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]


@pytest.mark.parametrize("num_prompt_tokens", [MAX_MODEL_LEN - 3, MAX_MODEL_LEN - 1])
def test_a_sequence_ends_at_max_model_len(tight_server: RunningServer, num_prompt_tokens: int):
    with connect(tight_server) as client:
        answer = client.generate(input_ids=[5] * num_prompt_tokens, adapter_id=ADAPTERS[0], ignore_eos=True)
    assert answer.num_input_tokens == num_prompt_tokens
    assert answer.num_output_tokens == MAX_MODEL_LEN - num_prompt_tokens
    assert answer.finish_reason == "length"


def test_a_prompt_of_max_model_len_is_refused(tight_server: RunningServer):
    with (
        connect(tight_server) as client,
        pytest.raises(InvalidArgument, match=f"max_model_len={MAX_MODEL_LEN}"),
    ):
        client.generate(input_ids=[5] * MAX_MODEL_LEN)
