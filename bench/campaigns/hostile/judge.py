"""Says what is wrong with what a client met. Nothing: each request was answered once, and rightly."""

from __future__ import annotations

import re
from collections.abc import Sequence

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from .case import Asked, Case, GrpcCall, HttpBytes, HttpCall, Known, Outcome, Reply

CODES = {
    # code: HTTP status of /infer, gRPC code
    "INVALID_ARG": ("400", "INVALID_ARGUMENT"),
    "NOT_FOUND": ("404", "NOT_FOUND"),
    "UNSUPPORTED": ("501", "UNIMPLEMENTED"),
    "UNAVAILABLE": ("503", "UNAVAILABLE"),
    "CANCELLED": ("499", "CANCELLED"),
}
"""What an error of ours may say. INTERNAL is not among them: it is a fault."""
_TAG = re.compile(r"\[([A-Z_]+)\] .", re.DOTALL)

TRITON_REFUSALS = tuple(
    re.compile(rf"^(\[request id: [^\]]*\] )?{pattern}", re.DOTALL)
    for pattern in (
        # JSON and HTTP
        r"failed to parse the request JSON buffer: ",
        r"attempt to (get|access) ",
        r"(Unable to parse|Expected JSON object for keyword:|failed to get request params\.:) ?",
        r"(Converting keyword: )?('parameters': )?parameter '.*' has invalid type\. It should be either",
        r"Converting keyword: 'parameters': Unable to parse ",
        r"string correlation ID cannot be longer than ",
        r"inference header size should be in range ",
        r"Unsupported content-encoding, only 'identity' is supported\.",
        r"This (API|protocol) is restricted, expecting header ",
        r"(Not Found|Method Not Allowed|Bad Request)$",
        # models
        r"Request for unknown model: '.*' (version .* )?is not found",
        r"failed to get model version from specified version string ",
        r"(HTTP end point|ModelInfer RPC) doesn't support models with decoupled transaction policy",
        r"generate expects model to produce exactly 1 response",
        # tensors
        r"(unexpected shape for|unexpected inference|input byte size mismatch for) input ",
        r"input '.*' (already exists in request|batch size does not match other inputs)",
        r"(unexpected number of|expected \d+) string elements ",
        r"out of bounds index \d+: request has \d+ inputs",
        r"inference request batch-size must be <= 64 ",
        r"contents field must not be specified when using raw_input_contents ",
        r"inference input '.*' data-type is '.*', but model '.*' expects ",
        r"(invalid datatype for input|input '.*' has no shape but model requires batch dimension) ",
        r"receiving \w+ data via JSON is not supported",
        r"unexpected inference output ",
        r"All input dimensions should be specified for input ",
        r"incomplete string length indicator for inference input ",
        r"unexpected additional input data for model ",
        r"batch size \d+ for '.*', max allowed is 64",
        r"unexpected size for input '.*', expecting \d+ additional bytes",
        r"Raw request must only have 1 input ",
        r"Input must set only one of the following fields: ",
        # parameters of a type that Triton has none for, or with a meaning to it
        r"invalid value type for '.*' parameter, expected ",
        r"parameter keys starting with 'triton_' are reserved ",
        r"invalid value for '.*', expected ",
        # gRPC
        r"Unable to parse request$",
        # a refusal that quotes a name too long for gRPC's headers
        r"Stream removed \(received metadata size exceeds soft limit ",
    )
)
"""What Triton says by itself of a request that never reaches a model of ours."""

SPREADS = re.compile(r"^incomplete string data for inference input ")
"""A refusal by Triton 24.10's Python backend that also goes to whoever came in the same batch."""

_OUTPUTS = {
    "text_output": "BYTES",
    "output_ids": "INT32",
    "finish_reason": "BYTES",
    "num_input_tokens": "INT32",
    "num_output_tokens": "INT32",
    "logprobs": "BYTES",
    "adapter_version": "BYTES",
}


def find_faults(case: Case, outcome: Outcome, answers: Sequence[object]) -> list[str]:
    """What is wrong with an outcome.

    Args:
        answers: the known answers; each has `start(num_tokens)` and `is_tie(token_ids)`.
    """
    if outcome.fault:
        return [outcome.fault]
    if outcome.end == "timed out":
        return ["no end within the time allowed"]
    if outcome.end == "cancelled" or isinstance(case.wire, HttpBytes):
        return []
    if outcome.end == "closed":
        return [] if case.kind in ("malformed HTTP",) else ["the connection was closed without an answer"]
    faults = []
    for request_id, asked in zip(_ids(case), case.asked, strict=True):
        replies = outcome.replies.get(request_id, []) + (outcome.replies.get("", []) if request_id else [])
        num_final = outcome.num_final.get(request_id, 0) + (outcome.num_final.get("", 0) if request_id else 0)
        faults += _judge(case, asked, replies, num_final, answers)
    unknown = set(outcome.replies) - set(_ids(case)) - {""}
    return faults + [f"replies to a request that was not sent: {unknown}"] * bool(unknown)


def _ids(case: Case) -> list[str]:
    if isinstance(case.wire, GrpcCall) and case.wire.is_stream and case.wire.is_marked:
        return [f"r{number}" for number in range(len(case.wire.messages))]
    return [""]


def _judge(
    case: Case, asked: Asked, replies: Sequence[Reply], num_final: int, answers: Sequence[object]
) -> list[str]:
    if not replies:
        # Triton ends a stream without a word when it cannot read a message.
        return [] if _is_unreadable(case) else ["no reply"]
    has_marks = not isinstance(case.wire, GrpcCall) or case.wire.is_marked
    # Triton's own refusals on a stream have no final flag.
    if has_marks and num_final != 1 and not (num_final == 0 and _is_tritons(replies[-1])):
        return [f"{num_final} final replies: {_show(replies)}"]
    errors = [reply for reply in replies if reply.error is not None]
    if not errors:
        if asked.expects == "refusal":
            return [f"served, and should not be: {_show(replies)}"]
        return _check_answer(case, asked, replies, answers)
    if len(errors) > 1 or replies[-1] is not errors[0]:
        return [f"something follows an error: {_show(replies)}"]
    if SPREADS.search(errors[0].error or ""):
        return []
    if asked.expects == "answer":
        return [f"refused, and should not be: {errors[0].error}"]
    return _check_error(case, errors[0])


def _is_unreadable(case: Case) -> bool:
    if not isinstance(case.wire, GrpcCall):
        return False
    try:
        service_pb2.ModelInferRequest.FromString(case.wire.messages[0])
    except DecodeError:
        return True
    return False


def _is_tritons(reply: Reply) -> bool:
    return any(pattern.search(reply.error or "") for pattern in TRITON_REFUSALS)


def _check_error(case: Case, reply: Reply) -> list[str]:
    text = reply.error or ""
    tag = _TAG.match(text)
    if tag is None or (tag[1] not in CODES and tag[1] != "INTERNAL"):
        if _is_tritons(reply):
            return []
        return [f"an error in no known form, status {reply.status}: {text[:300]!r}"]
    if tag[1] == "INTERNAL":
        return [f"a fault of ours: {text[:300]}"]
    is_infer = isinstance(case.wire, HttpCall) and "/infer" in case.wire.path
    wanted = CODES[tag[1]][0] if is_infer else CODES[tag[1]][1] if isinstance(case.wire, GrpcCall) else ""
    if wanted and reply.status and reply.status != wanted:
        return [f"status {reply.status} beside {text[:100]}"]
    return []


def _check_answer(case: Case, asked: Asked, replies: Sequence[Reply], answers: Sequence[object]) -> list[str]:
    if case.kind in ("mutated JSON", "mutated bytes", "Triton's parameter", "inputs", "malformed HTTP"):
        # They may have asked for fewer outputs, or for something else than an answer.
        return []
    for reply in replies:
        types = {name: reply.outputs[name][0] for name in _OUTPUTS if name in reply.outputs}
        if types != _OUTPUTS:
            return [f"outputs {types}"]
    reasons = [reply.outputs["finish_reason"][2] for reply in replies]
    if any(any(each) for each in reasons[:-1]) or not set(reasons[-1]) <= {b"stop", b"length"}:
        return [f"finish reasons {reasons}"]
    num_rows = len(reasons[-1])
    rows = _rows(replies, num_rows)
    counts = replies[-1].outputs["num_output_tokens"][2]
    if [len(row) for row in rows] != counts:
        return [f"num_output_tokens {counts} beside {rows}"]
    if asked.known and len(asked.known) != num_rows:
        return [f"{num_rows} answers to {len(asked.known)} sequences"]
    return [
        fault
        for known, row in zip(asked.known, rows, strict=False)
        for fault in _compare(known, row, answers)
    ]


def _rows(replies: Sequence[Reply], num_rows: int) -> list[list[int]]:
    """The ids of each sequence, without what pads them."""
    if num_rows == 1:
        flat = [token for reply in replies for token in reply.outputs["output_ids"][2]]
        return [[token for token in flat if token >= 0]]
    flat = replies[0].outputs["output_ids"][2]
    width = len(flat) // num_rows
    return [[token for token in flat[i * width : (i + 1) * width] if token >= 0] for i in range(num_rows)]


def _compare(known: Known, row: list[int], answers: Sequence[object]) -> list[str]:
    try:
        answers[known.place].start(known.num_tokens).is_tie(row)  # type: ignore[attr-defined]
    except AssertionError as error:
        return [f"wrong answer: {error}"]
    return []


def _show(replies: Sequence[Reply]) -> str:
    return "; ".join(
        reply.error or str({n: v[2] for n, v in reply.outputs.items()})[:200] for reply in replies[-3:]
    )
