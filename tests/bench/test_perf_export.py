"""The reader of perf_analyzer's exports, on hand-made and on real ones, and the mix that is sent."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.perf_analyzer import inputs, report

REAL = Path(__file__).parent / "perf_exports"
"""Of perf_analyzer 2.60 and a running server: three requests of three tokens, one of batches of two."""
MS = 1_000_000


def record(*replies: tuple[float, Mapping[str, Any]], start_ms: float = 0) -> dict[str, Any]:
    """One exported request: when each reply came, in milliseconds, and its outputs."""
    return {
        "timestamp": int(start_ms * MS),
        "request_inputs": {"text_input": "The sea is"},
        "response_timestamps": [int(time_ms * MS) for time_ms, _ in replies],
        "response_outputs": [dict(outputs) for _, outputs in replies],
    }


def tokens_so_far(total: int, finish: str = "") -> dict[str, Any]:
    return {
        "num_output_tokens": total,
        "num_input_tokens": 3,
        "finish_reason": finish,
        "adapter_version": "v",
    }


def event(total: int, finish: str = "") -> str:
    return f"data: {json.dumps(tokens_so_far(total, finish))}\n\n"


def read(tmp_path: Path, records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The requests of an export of one load."""
    path = tmp_path / "export.json"
    experiment = {"experiment": {"mode": "concurrency", "value": 4}, "requests": list(records)}
    path.write_text(json.dumps({"experiments": [experiment]}))
    (level,) = report.read_export(path)
    assert level.load == "concurrency 4"
    return list(level.requests)


def test_a_stream_shows_its_first_token_the_times_between_and_its_latency(tmp_path: Path) -> None:
    streamed = record(
        (10, tokens_so_far(1)), (14, tokens_so_far(2)), (20, tokens_so_far(3, "length")), start_ms=2
    )
    row = report.measure(read(tmp_path, [streamed]))
    assert (row.num_requests, row.num_errors) == (1, 0)
    assert (row.mean_input_tokens, row.mean_output_tokens) == (3, 3)
    assert row.requests_per_s == pytest.approx(1 / 0.018)
    assert row.tokens_per_s == pytest.approx(3 / 0.018)
    assert row.first_token == report.Spread(p50_ms=8, p90_ms=8, p99_ms=8)
    assert row.between_tokens.p50_ms == pytest.approx(5)
    assert row.latency.p50_ms == pytest.approx(18)


def test_tokens_that_come_together_share_the_time_since_the_reply_before(tmp_path: Path) -> None:
    streamed = record((10, tokens_so_far(1)), (22, tokens_so_far(4)), (30, tokens_so_far(5, "stop")))
    row = report.measure(read(tmp_path, [streamed]))
    # Three tokens of 4 ms each, one of 8 ms.
    assert (row.between_tokens.p50_ms, row.between_tokens.p99_ms) == pytest.approx((4, 7.88))


def test_a_reply_without_tokens_is_neither_the_first_token_nor_a_gap(tmp_path: Path) -> None:
    streamed = record(
        (5, tokens_so_far(0)), (10, tokens_so_far(1)), (12, tokens_so_far(1)), (20, tokens_so_far(2, "stop"))
    )
    row = report.measure(read(tmp_path, [streamed]))
    assert row.first_token.p50_ms == pytest.approx(10)
    assert row.between_tokens.p99_ms == pytest.approx(10)


def test_an_answer_in_one_piece_has_a_latency_only(tmp_path: Path) -> None:
    row = report.measure(read(tmp_path, [record((40, tokens_so_far(8, "length")))]))
    assert (row.first_token, row.between_tokens) == (None, None)
    assert row.latency.p50_ms == pytest.approx(40)
    assert "-" in report.format_table([("one", row)])


def test_percentiles_and_rates_go_over_all_requests_of_a_load(tmp_path: Path) -> None:
    records = [record((100 * i + 10 + i, tokens_so_far(1, "length")), start_ms=100 * i) for i in range(101)]
    row = report.measure(read(tmp_path, records))
    assert row.latency == report.Spread(p50_ms=60, p90_ms=100, p99_ms=109)
    assert row.requests_per_s == pytest.approx(101 / 10.11)


@pytest.mark.parametrize(
    ("pieces", "times_ms"),
    [
        pytest.param([event(1), event(2), event(3, "stop"), ""], [10, 20, 30], id="one event each"),
        pytest.param([event(1) + event(2), event(3, "stop") + "", ""], [10, 10, 20], id="two at once"),
        pytest.param(
            [event(1)[:15], event(1)[15:] + event(2)[:40], event(2)[40:] + event(3, "stop"), ""],
            [20, 30, 30],
            id="cut anywhere",
        ),
    ],
)
def test_events_over_http_are_put_together_and_the_empty_last_reply_is_dropped(
    tmp_path: Path, pieces: list[str], times_ms: list[int]
) -> None:
    exported = record(*((10 * (i + 1), {"response": piece}) for i, piece in enumerate(pieces)))
    exported["request_inputs"] = {"payload": json.dumps({"text_input": "The sea is", "max_tokens": 3})}
    (request,) = read(tmp_path, [exported])
    assert [reply.time_ns for reply in request.replies] == [time_ms * MS for time_ms in times_ms]
    assert [reply.num_tokens for reply in request.replies] == [1, 1, 1]
    assert request.end_ns == times_ms[-1] * MS
    assert (request.prompt, request.adapter_version, request.error) == ("The sea is", "v", "")


def test_a_character_cut_in_two_does_not_spoil_the_export(tmp_path: Path) -> None:
    fields = {**tokens_so_far(1, "stop"), "text_output": "é"}
    body = f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
    before, after = body.split("é")
    exported = json.dumps(
        {
            "experiments": [
                {
                    "experiment": {"mode": "request_rate", "value": 2.5},
                    "requests": [
                        record((10, {"response": before + "<1>"}), (20, {"response": "<2>" + after}))
                    ],
                }
            ]
        }
    )
    path = tmp_path / "export.json"
    path.write_bytes(exported.encode().replace(b"<1>", b"\xc3").replace(b"<2>", b"\xa9"))
    (level,) = report.read_export(path)
    assert level.load == "request rate 2.5"
    assert (level.requests[0].num_tokens, level.requests[0].error) == (1, "")


@pytest.mark.parametrize(
    ("replies", "problem"),
    [
        pytest.param([], "no reply", id="nothing"),
        pytest.param([(9, {"response": ""})], "no reply", id="only the empty last one"),
        pytest.param(
            [(9, tokens_so_far(1))], "the last reply has no finish_reason", id="stopped in the middle"
        ),
        pytest.param(
            [(9, {"response": event(1)}), (19, {"response": 'data: {"error":"[UNAVAILABLE] gone"}\n\n'})],
            "[UNAVAILABLE] gone",
            id="error in the middle",
        ),
        pytest.param([(9, {"response": event(1, "stop") + "data: {"})], "not JSON: 'data: {'", id="cut off"),
        pytest.param([(9, {"response": "data: 7\n\n"})], "not an object: 'data: 7'", id="no object"),
    ],
)
def test_a_request_that_failed_is_counted_and_adds_nothing(
    tmp_path: Path, replies: list[tuple[float, dict[str, Any]]], problem: str
) -> None:
    requests = read(tmp_path, [record(*replies), record((30, tokens_so_far(4, "length")))])
    assert [request.error for request in requests] == [problem, ""]
    row = report.measure(requests)
    assert (row.num_requests, row.num_errors, row.mean_output_tokens) == (2, 1, 4)
    assert row.latency == report.Spread(p50_ms=30, p90_ms=30, p99_ms=30)
    assert row.tokens_per_s == pytest.approx(4 / 0.030)


def test_a_load_of_failures_only_still_gives_a_row(tmp_path: Path) -> None:
    row = report.measure(read(tmp_path, [record()]))
    assert (row.num_errors, row.requests_per_s, row.latency) == (1, 0, None)
    assert report.format_table([("none", row)]).splitlines()[-1].split()[:3] == ["none", "1", "1"]


@pytest.mark.parametrize(
    ("outputs", "num_tokens"),
    [
        pytest.param({"num_output_tokens": 5, "output_ids": [1, 2]}, 5, id="the server's count first"),
        pytest.param({"num_output_tokens": [5, 3]}, 8, id="a batch of two"),
        pytest.param({"output_ids": [7, 8, -1, -1]}, 2, id="ids without padding"),
        pytest.param({"output_ids": 7}, 1, id="a single id"),
        pytest.param({"text_output": "the sea"}, 1, id="else the reply"),
    ],
)
def test_tokens_are_counted_by_what_the_export_has(
    tmp_path: Path, outputs: dict[str, Any], num_tokens: int
) -> None:
    (request,) = read(tmp_path, [record((10, outputs))])
    assert request.num_tokens == num_tokens


def test_an_export_without_outputs_counts_replies(tmp_path: Path) -> None:
    exported = record((10, {}), (20, {}))
    del exported["response_outputs"]
    (request,) = read(tmp_path, [exported])
    assert (request.num_tokens, request.error) == (2, "")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"experiments": [{}]}', '{"experiments": 3}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(report.ExportError, match=r"other\.json: not an export of perf_analyzer"):
        report.read_export(path)


@pytest.mark.parametrize("name", ["stream_one_adapter", "stream_tensor_mix", "stream_parameter_mix"])
def test_a_real_stream_is_read_whole(name: str) -> None:
    (level,) = report.read_export(REAL / f"{name}.json")
    assert level.load == "concurrency 2"
    assert [request.error for request in level.requests] == ["", "", ""]
    assert [request.num_tokens for request in level.requests] == [3, 3, 3]
    assert [request.num_input_tokens for request in level.requests] == [4, 4, 4]
    assert len({request.prompt for request in level.requests}) == 3
    assert len({request.adapter_version for request in level.requests}) == (1 if "one" in name else 3)
    for request in level.requests:
        times = [request.start_ns, *(reply.time_ns for reply in request.replies)]
        assert times == sorted(times)
    row = report.measure(level.requests[:1])
    # Three tokens: the first, and two gaps, whose median is their mean.
    sum_ms = row.first_token.p50_ms + 2 * row.between_tokens.p50_ms
    assert sum_ms == pytest.approx(row.latency.p50_ms)


@pytest.mark.parametrize(
    ("name", "num_tokens"), [("whole_tensor_mix", [3, 3, 3]), ("whole_batches_of_two", [16, 16])]
)
def test_real_whole_answers_are_read(name: str, num_tokens: list[int]) -> None:
    (level,) = report.read_export(REAL / f"{name}.json")
    assert [request.num_tokens for request in level.requests] == num_tokens
    row = report.measure(level.requests)
    assert (row.num_errors, row.first_token, row.between_tokens) == (0, None, None)


@pytest.mark.parametrize(
    ("num_requests", "num_adapters", "skew", "wanted"),
    [
        pytest.param(12, 3, 0, [4, 4, 4], id="uniform"),
        pytest.param(11, 3, 1, [6, 3, 2], id="zipf"),
        pytest.param(3, 5, 0, [1, 1, 1, 0, 0], id="more adapters than requests"),
        pytest.param(7, 1, 2, [7], id="one adapter"),
    ],
)
def test_adapters_get_their_shares(
    num_requests: int, num_adapters: int, skew: float, wanted: list[int]
) -> None:
    assert inputs.share_out(num_requests, num_adapters, skew) == wanted


def test_entries_are_a_shuffled_mix_with_prompts_of_their_own() -> None:
    made = [
        inputs.make_entries(["", "pirate"], num_requests=200, num_words=8, skew=0.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert made[0] == made[1]
    assert not {entry.prompt for entry in made[0]} & {entry.prompt for entry in made[2]}
    assert Counter(entry.adapter_id for entry in made[0]) == {"": 100, "pirate": 100}
    assert len({entry.prompt for entry in made[0]}) == 200
    assert {len(entry.prompt.split()) for entry in made[0]} == {8}
    # Not in turn: perf_analyzer's connections take entries at a fixed stride.
    assert len({entry.adapter_id for entry in made[0][::2]}) == 2


def test_each_way_carries_the_adapter_in_its_own_form() -> None:
    entries = [inputs.Entry(prompt="one two", adapter_id="pirate")]
    parameters = {"max_tokens": 4, "ignore_eos": True}
    (tensors,) = json.loads(inputs.with_tensor(entries, parameters))["data"]
    assert tensors["text_input"] == ["one two"]
    assert json.loads(tensors["sampling_parameters"][0]) == {**parameters, "adapter_id": "pirate"}
    (body,) = json.loads(inputs.with_body(entries, parameters))["data"]
    assert body["payload"] == [{"text_input": "one two", **parameters, "adapter_id": "pirate"}]
    assert json.loads(inputs.text_only(entries))["data"] == [{"text_input": ["one two"]}]
