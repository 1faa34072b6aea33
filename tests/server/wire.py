"""Requests as any client writes them: tritonclient over both protocols, /generate and /generate_stream."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from manylora.serve.background import RunningServer
from tritonclient.utils import InferenceServerException

from bench.campaigns.harness import DONE_S

CLIENTS: dict[str, Any] = {"http": tritonclient.http, "grpc": tritonclient.grpc}
OUTPUTS = {
    "text_output": np.object_,
    "output_ids": np.int32,
    "finish_reason": np.object_,
    "num_input_tokens": np.int32,
    "num_output_tokens": np.int32,
    "logprobs": np.object_,
    "adapter_version": np.object_,
}
HTTP_STATUS = {"NOT_FOUND": "404", "INVALID_ARG": "400", "UNSUPPORTED": "501", "UNAVAILABLE": "503"}
GRPC_STATUS = {
    "NOT_FOUND": "StatusCode.NOT_FOUND",
    "INVALID_ARG": "StatusCode.INVALID_ARGUMENT",
    "UNSUPPORTED": "StatusCode.UNIMPLEMENTED",
    "UNAVAILABLE": "StatusCode.UNAVAILABLE",
}


def tensor(module: Any, name: str, rows: list[Any]) -> Any:
    if name == "input_ids":
        array, kind = np.array(rows, np.int32), "INT32"
    else:
        array, kind = np.array([[row.encode()] for row in rows], np.object_), "BYTES"
    found = module.InferInput(name, list(array.shape), kind)
    found.set_data_from_numpy(array)
    return found


def infer(
    server: RunningServer, protocol: str, inputs: dict[str, list[Any]], model: str = "llm", **parameters: Any
) -> Any:
    module = CLIENTS[protocol]
    address = server.http if protocol == "http" else server.grpc
    timeouts = {"network_timeout": DONE_S, "connection_timeout": DONE_S} if protocol == "http" else {}
    with module.InferenceServerClient(address, **timeouts) as client:
        tensors = [tensor(module, name, rows) for name, rows in inputs.items()]
        return client.infer(model, tensors, parameters=parameters)


def post(server: RunningServer, path: str, body: dict[str, Any] | bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.http, timeout=DONE_S)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def generate(server: RunningServer, **body: Any) -> dict[str, Any]:
    status, text = post(server, "/v2/models/llm/generate", body)
    assert status == 200, text
    return dict(json.loads(text))


def refusal(server: RunningServer, **body: Any) -> str:
    status, text = post(server, "/v2/models/llm/generate", body)
    assert status == 400, text
    return str(json.loads(text)["error"])


def stream(server: RunningServer, **body: Any) -> Iterator[dict[str, Any]]:
    status, text = post(server, "/v2/models/llm_stream/generate_stream", body)
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    for number, event in enumerate(events):
        fields = json.loads(event.removeprefix("data: "))
        if number == 0:
            assert (status == 200) == ("error" not in fields)
        # An error is the last of all; after a first reply it can no longer change the status.
        assert "error" not in fields or number == len(events) - 1
        yield fields


def check_refused(
    server: RunningServer, parameters: dict[str, Any], code: str, words: str, prompt: str = "x"
) -> None:
    """The same refusal on every way in: its code where the way carries one, and its message."""
    for protocol, status in (("http", HTTP_STATUS[code]), ("grpc", GRPC_STATUS[code])):
        with pytest.raises(InferenceServerException) as caught:
            infer(server, protocol, {"text_input": [prompt]}, **parameters)
        assert caught.value.status() == status
        assert caught.value.message().startswith(f"[{code}] ")
        assert words in caught.value.message()
    message = refusal(server, text_input=prompt, **parameters)
    assert message.startswith(f"[{code}] ")
    assert words in message
    *_, event = stream(server, text_input=prompt, **parameters)
    assert event["error"].startswith(f"[{code}] ")
    assert words in event["error"]
