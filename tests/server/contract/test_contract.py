"""The wire contract as any client meets it: tritonclient over both protocols, /generate, /generate_stream."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from manylora.serve.background import RunningServer
from manylora_client import InvalidArgument, NotFound
from tritonclient.utils import InferenceServerException

from bench.campaigns.harness import DONE_S, PROMPTS, SYNTHETIC, TRAINED, at_once, connect, wait_idle

from ..wire import OUTPUTS, check_refused, generate, infer, post, stream


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_output_is_there_with_its_type_and_shape(server: RunningServer, protocol: str):
    result = infer(server, protocol, {"text_input": [PROMPTS[0]]}, adapter_id=SYNTHETIC[0], max_tokens=5)
    arrays = {name: result.as_numpy(name) for name in OUTPUTS}
    assert {name: array.dtype for name, array in arrays.items()} == OUTPUTS
    assert {name: array.shape for name, array in arrays.items()} == {
        name: (1, 5) if name == "output_ids" else (1, 1) for name in OUTPUTS
    }
    assert arrays["finish_reason"].item() == b"length"
    assert arrays["num_output_tokens"].item() == 5
    assert arrays["logprobs"].item() == b""
    assert len(arrays["adapter_version"].item()) == 32
    assert arrays["text_output"].item()


def test_the_base_model_has_no_version(server: RunningServer, protocol: str):
    result = infer(server, protocol, {"text_input": [PROMPTS[0]]}, max_tokens=2)
    assert result.as_numpy("adapter_version").item() == b""


def test_a_batch_is_padded_on_the_right(server: RunningServer, protocol: str):
    rows = [
        json.dumps({"max_tokens": n, "adapter_id": name}) for n, name in [(2, ""), (6, SYNTHETIC[1]), (4, "")]
    ]
    result = infer(server, protocol, {"text_input": list(PROMPTS[:3]), "sampling_parameters": rows})
    ids = result.as_numpy("output_ids")
    assert ids.shape == (3, 6)
    assert [(row >= 0).tolist() for row in ids] == [[i < n for i in range(6)] for n in (2, 6, 4)]
    assert (ids[ids < 0] == -1).all()
    assert result.as_numpy("num_output_tokens").tolist() == [[2], [6], [4]]
    assert [bool(v) for v in result.as_numpy("adapter_version")[:, 0]] == [False, True, False]
    for n, prompt, name, row in zip((2, 6, 4), PROMPTS, ("", SYNTHETIC[1], ""), ids, strict=False):
        alone = infer(server, protocol, {"text_input": [prompt]}, max_tokens=n, adapter_id=name)
        assert alone.as_numpy("output_ids")[0].tolist() == row[:n].tolist()


def test_request_parameters_win_over_the_tensor(server: RunningServer, protocol: str):
    both = {
        "text_input": list(PROMPTS[:2]),
        "sampling_parameters": ['{"max_tokens": 2}', '{"max_tokens": 3}'],
    }
    assert infer(server, protocol, both).as_numpy("num_output_tokens").tolist() == [[2], [3]]
    assert infer(server, protocol, both, max_tokens=4).as_numpy("num_output_tokens").tolist() == [[4], [4]]


def test_a_failing_sequence_fails_its_request(server: RunningServer, protocol: str):
    rows = ['{"max_tokens": 2}', '{"adapter_id": "nobody"}']
    with pytest.raises(InferenceServerException, match=r"\[NOT_FOUND\]"):
        infer(server, protocol, {"text_input": list(PROMPTS[:2]), "sampling_parameters": rows})


def test_rows_of_a_batch_differ_in_everything(server: RunningServer, protocol: str):
    rows = [
        {"max_tokens": 3, "logprobs": 2, "echo": True},
        {"max_tokens": 6, "adapter_id": SYNTHETIC[1]},
        {"max_tokens": 4, "adapter_id": SYNTHETIC[1], "adapter_scale": 0, "logprobs": 1},
        {"max_tokens": 5, "temperature": 1, "seed": 3, "min_p": 0.1, "request_priority": 4},
        {"max_tokens": 5, "repetition_penalty": 1.5, "deadline_ms": 10**6, "echo": True, "logprobs": 20},
    ]
    prompts = list(PROMPTS[:5])
    batch = infer(
        server, protocol, {"text_input": prompts, "sampling_parameters": [json.dumps(row) for row in rows]}
    )
    assert {name: batch.as_numpy(name).shape for name in OUTPUTS} == {
        name: (5, 6) if name == "output_ids" else (5, 1) for name in OUTPUTS
    }
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        alone = generate(server, text_input=prompt, **row)
        ids = alone["output_ids"]
        assert batch.as_numpy("output_ids")[i].tolist() == ids + [-1] * (6 - len(ids))
        assert batch.as_numpy("text_output")[i].item().decode() == alone["text_output"]
        assert alone["text_output"].startswith(prompt) == bool(row.get("echo"))
        text = batch.as_numpy("logprobs")[i].item().decode()
        assert bool(text) == ("logprobs" in row)
        if text:
            entries = json.loads(text)
            assert [entry["id"] for entry in entries] == ids
            assert {len(entry["top"]) for entry in entries} == {row["logprobs"]}


def test_a_deadline_of_one_row_fails_its_request(server: RunningServer, protocol: str):
    rows = ['{"max_tokens": 2}', '{"max_tokens": 4000, "ignore_eos": true, "deadline_ms": 1}']
    with pytest.raises(InferenceServerException, match=r"\[UNAVAILABLE\] deadline_ms=1 passed"):
        infer(server, protocol, {"text_input": list(PROMPTS[:2]), "sampling_parameters": rows})
    assert wait_idle(server).check_errors == []


def test_a_batch_of_no_sequences_is_an_error(server: RunningServer):
    module = tritonclient.grpc
    none = module.InferInput("text_input", [0, 1], "BYTES")
    none.set_data_from_numpy(np.empty((0, 1), np.object_))
    with (
        module.InferenceServerClient(server.grpc) as client,
        pytest.raises(InferenceServerException),
    ):
        client.infer("llm", [none], client_timeout=DONE_S)


def test_a_request_id_that_is_no_utf8_is_answered(server: RunningServer):
    body = b'{"id": "\xff", "text_input": "The sea", "max_tokens": 2}'
    status, text = post(server, "/v2/models/llm/generate", body)
    assert (status, "text_output" in text) in ((200, True), (400, False))
    assert generate(server, text_input="The sea", max_tokens=2)["num_output_tokens"] == 2


def test_text_and_ids_ask_the_same(server: RunningServer, protocol: str):
    asked = infer(server, protocol, {"text_input": [PROMPTS[0]]}, max_tokens=4)
    ids = generate(server, text_input=PROMPTS[0], max_tokens=1)["num_input_tokens"]
    assert asked.as_numpy("num_input_tokens").item() == ids
    answer = asked.as_numpy("output_ids")[0].tolist()
    echoed = infer(server, protocol, {"input_ids": [answer]}, max_tokens=3)
    assert echoed.as_numpy("num_input_tokens").item() == 4


def test_generate_answers_in_plain_json(server: RunningServer):
    answer = generate(
        server, id="7", stream=False, text_input=PROMPTS[0], max_tokens=4, adapter_id=SYNTHETIC[0]
    )
    assert set(answer) >= set(OUTPUTS)
    assert answer["num_output_tokens"] == len(answer["output_ids"]) == 4
    nested = generate(server, text_input=PROMPTS[0], parameters={"max_tokens": 4, "lora_name": SYNTHETIC[0]})
    assert (nested["text_output"], nested["adapter_version"]) == (
        answer["text_output"],
        answer["adapter_version"],
    )
    by_tensor = generate(
        server,
        text_input=PROMPTS[0],
        sampling_parameters=json.dumps({"max_tokens": 4, "adapter_id": SYNTHETIC[0]}),
    )
    assert by_tensor["output_ids"] == answer["output_ids"]


def test_generate_stream_answers_in_events(server: RunningServer):
    whole = generate(server, text_input=PROMPTS[1], max_tokens=6)
    events = list(stream(server, text_input=PROMPTS[1], max_tokens=6))
    assert all(set(event) >= set(OUTPUTS) for event in events)
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    assert [event["finish_reason"] for event in events] == [""] * (len(events) - 1) + ["length"]
    assert events[-1]["num_output_tokens"] == 6


def test_a_decoupled_model_takes_one_sequence_only(server: RunningServer):
    (event,) = stream(server, text_input=["a", "b"])
    assert event["error"].startswith("[INVALID_ARG]")


@pytest.mark.parametrize(
    ("parameters", "code", "words"),
    [
        ({"adapter_id": "nobody"}, "NOT_FOUND", "nobody"),
        ({"lora_name": "nobody"}, "NOT_FOUND", "nobody"),
        ({"adapter_id": "a", "lora_name": "b"}, "INVALID_ARG", "lora_name"),
        ({"adapter_id": "../escape"}, "INVALID_ARG", "../escape"),
        ({"adapter_id": "a/b"}, "INVALID_ARG", "a/b"),
        ({"adapter_id": 7}, "INVALID_ARG", "adapter_id"),
        ({"max_tokens": 0}, "INVALID_ARG", "max_tokens"),
        ({"max_tokens": -1}, "INVALID_ARG", "-1"),
        ({"max_tokens": 1.5}, "INVALID_ARG", "1.5"),
        ({"max_tokens": "many"}, "INVALID_ARG", "many"),
        ({"max_tokens": True}, "INVALID_ARG", "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "INVALID_ARG", "min_tokens"),
        ({"ignore_eos": "yes"}, "INVALID_ARG", "ignore_eos"),
        ({"stop": '["a", 1]'}, "INVALID_ARG", "stop"),
        ({"stop": '[""]'}, "INVALID_ARG", "stop"),
        ({"temperature": -0.1}, "INVALID_ARG", "temperature"),
        ({"temperature": "hot"}, "INVALID_ARG", "temperature"),
        ({"top_p": 0.0}, "INVALID_ARG", "top_p"),
        ({"top_p": 1.1}, "INVALID_ARG", "top_p"),
        ({"top_k": -1}, "INVALID_ARG", "top_k"),
        ({"seed": -1}, "INVALID_ARG", "seed"),
        ({"seed": 0.5}, "INVALID_ARG", "seed"),
        ({"chat": 1}, "INVALID_ARG", "chat"),
        ({"echo": "maybe"}, "INVALID_ARG", "echo"),
        ({"topp": 0.5}, "INVALID_ARG", "topp"),
        ({"": 1}, "INVALID_ARG", "no such parameter"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_bad_parameter_is_named(server: RunningServer, parameters: dict[str, Any], code: str, words: str):
    check_refused(server, parameters, code, words)


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_tokens": 3.0},
        {"max_tokens": "3"},
        {"ignore_eos": True, "min_tokens": 3},
        {"ignore_eos": "true"},
        {"stop": "zzz"},
        {"stop": '["zzz", "yyy"]'},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 2**63 - 1},
        {"temperature": "0.7", "seed": "3"},
        {"temperature": 1, "top_p": 1, "top_k": 0},
        {"chat": True},
        {"chat": "true"},
        {"echo": True},
        {"adapter_scale": 1.0, "logprobs": 0, "min_p": 0.0, "repetition_penalty": 1.0, "deadline_ms": 0},
        {"adapter_scale": "-0.5", "logprobs": "2", "min_p": 1, "repetition_penalty": 1.5},
        {"request_priority": -1000, "presence_penalty": 2, "frequency_penalty": -2.0, "deadline_ms": 10**6},
        {"triton_whatever": 1},
    ],
    ids=json.dumps,
)
def test_a_good_parameter_is_taken(server: RunningServer, parameters: dict[str, Any]):
    answer = generate(server, text_input="Hello", **{"max_tokens": 3, **parameters})
    assert answer["num_output_tokens"] <= 3


def test_echo_puts_the_prompt_first(server: RunningServer):
    plain = generate(server, text_input="The sea", max_tokens=3)
    echoed = generate(server, text_input="The sea", max_tokens=3, echo=True)
    assert echoed["text_output"] == "The sea" + plain["text_output"]
    first, *_ = stream(server, text_input="The sea", max_tokens=3, echo=True)
    assert first["text_output"].startswith("The sea")
    assert echoed["num_output_tokens"] == 3


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"text_input": ["x"], "input_ids": [[1]]}, "both"),
        ({"sampling_parameters": ["{}"]}, "neither"),
        ({"input_ids": [[49152]]}, "49152"),
        ({"input_ids": [[-1]]}, "-1"),
        ({"input_ids": [[1] * 8192]}, "max_model_len=8192"),
        ({"text_input": [""]}, "token"),
        ({"text_input": ["x"], "sampling_parameters": ["{"]}, "sampling_parameters"),
        ({"text_input": ["x"], "sampling_parameters": ["[]"]}, "sampling_parameters"),
        ({"text_input": ["x"], "sampling_parameters": ['{"seeds": 1}']}, "seeds"),
    ],
    ids=[
        "both",
        "neither",
        "id too high",
        "negative id",
        "too long",
        "empty",
        "no JSON",
        "no object",
        "unknown key",
    ],
)
def test_a_bad_input_is_an_error(
    server: RunningServer, protocol: str, inputs: dict[str, list[Any]], words: str
):
    with pytest.raises(InferenceServerException, match=r"^\S* ?\[INVALID_ARG\]") as caught:
        infer(server, protocol, inputs)
    assert words in caught.value.message()


def test_text_that_is_no_utf8_is_an_error(server: RunningServer):
    module = tritonclient.grpc
    raw = module.InferInput("text_input", [1, 1], "BYTES")
    raw.set_data_from_numpy(np.array([[b"\xff\xfe"]], np.object_))
    with (
        module.InferenceServerClient(server.grpc) as client,
        pytest.raises(InferenceServerException, match=r"\[INVALID_ARG\].*UTF-8"),
    ):
        client.infer("llm", [raw])


def test_llm_stream_refuses_infer_without_harm(server: RunningServer, protocol: str):
    with pytest.raises(InferenceServerException, match="decoupled"):
        infer(server, protocol, {"text_input": ["x"]}, model="llm_stream")


def test_a_bad_request_in_a_batch_fails_alone(server: RunningServer):
    kinds = ["", SYNTHETIC[0], "nobody", SYNTHETIC[1], "bad parameter", SYNTHETIC[2]] * 8
    before = num_mixed_executions(server)
    with connect(server, "grpc") as client:

        def ask(kind: str) -> str:
            extra = {"topp": 1} if kind == "bad parameter" else {"adapter_id": kind}
            try:
                return client.generate(PROMPTS[0], max_tokens=4, **extra).adapter_version or "base"
            except NotFound:
                return "not found"
            except InvalidArgument:
                return "invalid"

        found = at_once(ask, kinds)
    by_kind = {
        kind: {answer for asked, answer in zip(kinds, found, strict=True) if asked == kind} for kind in kinds
    }
    assert by_kind[""] == {"base"}
    assert by_kind["nobody"] == {"not found"}
    assert by_kind["bad parameter"] == {"invalid"}
    versions = [by_kind[name] for name in SYNTHETIC[:3]]
    assert all(len(version) == 1 for version in versions)
    assert len(set.union(*versions)) == 3
    assert wait_idle(server).check_errors == []
    assert num_mixed_executions(server) > before


def test_requests_for_different_adapters_arrive_in_one_execute(server: RunningServer):
    before = num_mixed_executions(server)
    with connect(server, "grpc") as client:
        for _ in range(10):
            # No two are for the same adapter, so any that come together are for different ones.
            at_once(
                lambda name: client.generate(PROMPTS[0], adapter_id=name, max_tokens=1), SYNTHETIC + TRAINED
            )
    assert num_mixed_executions(server) > before


def num_mixed_executions(server: RunningServer) -> int:
    """How many times Triton has called `execute` of `llm` with more than one request of one sequence."""
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        found = client.get_inference_statistics("llm").model_stats[0]
    assert found.execution_count <= found.inference_count
    return sum(batch.compute_infer.count for batch in found.batch_stats if batch.batch_size > 1)
