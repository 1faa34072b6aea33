"""Many streams at once: all end, each in order, the final flag with the last reply and nowhere else."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from manylora.serve.background import RunningServer, running_server
from manylora_client import Chunk, Completion

from bench.campaigns.harness import DONE_S, PROMPTS, SYNTHETIC, at_once, connect, wait_idle

NUM_STREAMS = 64
NUM_ROUNDS = 4
MAX_TOKENS = 6
NAMES = ["", *(f"synthetic-{seed:03}" for seed in range(11))]
WORK = [(PROMPTS[i % len(PROMPTS)], NAMES[i % len(NAMES)]) for i in range(NUM_STREAMS)]


@pytest.fixture(scope="module")
def server(small_model: Path, small_root: Path) -> Iterator[RunningServer]:
    """All adapters fit into one step."""
    arguments = ["--set=max_loras=12"]
    with running_server(base_model=small_model, adapter_root=small_root, arguments=arguments) as running:
        yield running


@pytest.fixture(scope="module")
def whole(server: RunningServer) -> list[Completion]:
    """The same requests without streaming."""
    with connect(server, "grpc") as client:
        return at_once(lambda w: client.generate(w[0], adapter_id=w[1], max_tokens=MAX_TOKENS), WORK)


def check(chunks: list[Chunk], answer: Completion) -> None:
    assert [bool(chunk.finish_reason) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    total = 0
    for chunk in chunks:
        total += len(chunk.token_ids)
        assert chunk.num_output_tokens == total
        assert chunk.num_input_tokens == answer.num_input_tokens
        assert chunk.adapter_version == answer.adapter_version
    assert [i for chunk in chunks for i in chunk.token_ids] == answer.token_ids
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert chunks[-1].finish_reason == answer.finish_reason


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_64_streams_at_once_four_times_over(server: RunningServer, whole: list[Completion], protocol: Any):
    with connect(server, protocol) as client:
        for _ in range(NUM_ROUNDS):
            found = at_once(lambda w: list(client.stream(w[0], adapter_id=w[1], max_tokens=MAX_TOKENS)), WORK)
            for chunks, answer in zip(found, whole, strict=True):
                check(chunks, answer)
                assert len(chunks) > 1
    status = wait_idle(server)
    assert status.check_errors == []


def test_64_requests_share_one_grpc_stream(server: RunningServer, whole: list[Completion]):
    arrived: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    replies: dict[str, list[Any]] = defaultdict(list)
    finals: list[str] = []
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        for number, (prompt, name) in enumerate(WORK):
            text = tritonclient.grpc.InferInput("text_input", [1, 1], "BYTES")
            text.set_data_from_numpy(np.array([[prompt.encode()]], np.object_))
            client.async_stream_infer(
                "llm_stream",
                [text],
                request_id=str(number),
                enable_empty_final_response=True,
                parameters={"adapter_id": name, "max_tokens": MAX_TOKENS},
            )
        while len(finals) < NUM_STREAMS:
            result, error = arrived.get(timeout=DONE_S)
            assert error is None
            response = result.get_response()
            assert response.id not in finals, "a reply after the final one"
            assert response.outputs, "a final flag without data"
            replies[response.id].append(result)
            if response.parameters["triton_final_response"].bool_param:
                finals.append(response.id)
        client.stop_stream()
    assert arrived.empty()
    for number, answer in enumerate(whole):
        found = replies[str(number)]
        ids = [int(i) for result in found for i in result.as_numpy("output_ids")[0]]
        assert ids == answer.token_ids
        totals = [int(result.as_numpy("num_output_tokens").item()) for result in found]
        assert totals == sorted(set(totals))
        assert totals[-1] == len(ids)
        reasons = [result.as_numpy("finish_reason").item() for result in found]
        assert reasons == [b""] * (len(found) - 1) + [answer.finish_reason.encode()]


def test_an_error_in_a_shared_stream_ends_only_its_request(server: RunningServer):
    arrived: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    texts = []
    errors = []
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        for name in ("", "nobody", SYNTHETIC[0]):
            text = tritonclient.grpc.InferInput("text_input", [1, 1], "BYTES")
            text.set_data_from_numpy(np.array([[b"Hi"]], np.object_))
            client.async_stream_infer("llm_stream", [text], parameters={"adapter_id": name, "max_tokens": 3})
        while len(texts) < 2 or not errors:
            result, error = arrived.get(timeout=DONE_S)
            if error is not None:
                errors.append(error.message())
            elif result.as_numpy("finish_reason").item():
                texts.append(result.as_numpy("text_output").item())
        client.stop_stream()
    assert [error[:11] for error in errors] == ["[NOT_FOUND]"]
