"""The two Triton models, `llm` and `llm_stream`. The only file that imports modules of Triton's stub.

`execute` only accepts requests and returns; replies come from the front end's reply thread.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from typing import Any

import c_python_backend_utils
import triton_python_backend_utils as pb_utils

# A front end needs a tokenizer, not tensors: without torch, transformers starts in half the time and a
# quarter of the memory. This process is only a front end; the engine has a process of its own.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from manylora import paths, run_dir, stub_process  # noqa: E402
from manylora.config import EngineConfig  # noqa: E402
from manylora.errors import InternalError, InvalidArgumentError, ManyloraError, UnavailableError  # noqa: E402
from manylora.front_end import protocol, tensor_door  # noqa: E402
from manylora.front_end.front_end import FrontEnd  # noqa: E402
from manylora.front_end.protocol import Tensors  # noqa: E402
from manylora.front_end.reply_loop import public_error  # noqa: E402
from manylora.supervise.engine_keeper import EngineKeeper  # noqa: E402
from manylora.supervise.health import HealthSocket, Stage  # noqa: E402

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
"""From the engine's report that it is ready to its answer on the socket."""
ATTACH_TIMEOUT_S = 1800.0
"""How long `llm_stream` waits for the engine: large models load for long."""


class TritonResponder(tensor_door.TensorResponder):
    """Replies of one Triton request."""

    def __init__(self, sender: Any, request_id: str, *, is_streaming: bool) -> None:
        self._sender = sender
        self.request_id = request_id
        self.is_streaming = is_streaming

    def send_tensors(self, outputs: Tensors, *, is_last: bool) -> None:
        # Triton treats a reply that finds no room as sent, and the client would wait for ever.
        stub_process.check_room(outputs, free_in_region=c_python_backend_utils.shared_memory.free_memory)
        tensors = [pb_utils.Tensor(name, values) for name, values in outputs.items()]
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=flags)

    def fail(self, error: ManyloraError) -> None:
        # The names of the codes are Triton's. They exist only once the stub has imported the model.
        code = getattr(pb_utils.TritonError, error.code)
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(error.tagged(), code))
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class _Model:
    """What both models share: accepting requests."""

    _front_end: FrontEnd
    _is_streaming: bool
    """Reply whenever there are new tokens; otherwise once, at the end."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called by Triton once, before the first request."""
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        stub_process.restrict_region()
        stub_process.lift_file_limit()
        self._name = args["model_name"]
        self._numbers = itertools.count(1)
        self._executing = Stage()
        parameters = json.loads(args["model_config"])["parameters"]
        settings = {key: value["string_value"] for key, value in parameters.items()}
        # An empty value counts as left out.
        settings = {key: text for key, text in settings.items() if text.strip()}
        configured = settings.pop("run_dir", "")
        self._owns_run_dir = not configured
        try:
            self._run_dir = run_dir.prepare(
                paths.from_text(configured) if configured else run_dir.default_path(os.getppid())
            )
            self._start(settings)
            stages = {"execute": self._executing, **self._front_end.stages}
            self._health = HealthSocket(run_dir.health_path(self._run_dir, self._name), stages)
        except ManyloraError as error:
            raise pb_utils.TritonModelException(error.tagged()) from error

    def execute(self, requests: list[Any]) -> None:
        """Called by Triton with the requests that came together. Returns at once."""
        with self._executing:
            self._accept(requests, time.monotonic())

    def _accept(self, requests: list[Any], arrived_s: float) -> None:
        for request in requests:
            responder = TritonResponder(
                request.get_response_sender(),
                _request_id(request) or f"{self._name}-{next(self._numbers)}",
                is_streaming=self._is_streaming,
            )
            try:
                tensors, parameters = _read(request)
            except BaseException as error:
                # If it left `execute`, it would fail every request of the call.
                self._front_end.refuse(responder, public_error(responder, error))
            else:
                tensor_door.submit(self._front_end, responder, tensors, parameters, arrived_s)

    def finalize(self) -> None:
        """Called by Triton once, at the end."""
        self._health.close()
        self._front_end.close()

    def _start(self, settings: dict[str, str]) -> None:
        raise NotImplementedError

    def _clear(self, engine_model: str) -> None:
        """Remove what the engine left in the run directory, and a directory that only these two models
        know."""
        run_dir.clear(self._run_dir, engine_model)
        if self._owns_run_dir:
            run_dir.remove(self._run_dir)


class LlmModel(_Model):
    """One reply per request. Owns the engine process."""

    _is_streaming = False

    def _start(self, settings: dict[str, str]) -> None:
        run_dir.clear(self._run_dir, self._name)
        # Held until this process ends.
        self._claim = run_dir.claim(self._run_dir, self._name)
        try:
            if "base_model" not in settings:
                raise InvalidArgumentError(
                    "base_model is not set: give the base model's directory in config.pbtxt"
                )
            config = EngineConfig.from_strings(settings)
            socket_path = run_dir.socket_path(self._run_dir, self._name)
            self._keeper = EngineKeeper(config, socket_path)
            self._keeper.start()
            self._front_end = FrontEnd(socket_path)
            if not self._front_end.wait_ready(READY_TIMEOUT_S):
                raise UnavailableError(
                    f"the engine does not answer on {paths.to_text(socket_path)} within {READY_TIMEOUT_S:g} s"
                )
        except Exception as error:
            # llm_stream must not wait for an engine that will not come.
            known = error if isinstance(error, ManyloraError) else InternalError(repr(error))
            run_dir.write_failure(self._run_dir, self._name, known)
            raise

    def finalize(self) -> None:
        """End what is in flight, then the engine."""
        super().finalize()
        self._keeper.stop()
        self._clear(self._name)


class LlmStreamModel(_Model):
    """Replies as tokens come. Attaches to the engine of `engine_model`."""

    _is_streaming = True

    def _start(self, settings: dict[str, str]) -> None:
        engine_model = settings.pop("engine_model", "llm")
        if settings:
            raise InvalidArgumentError(
                f"unknown key {', '.join(sorted(settings))}; known are engine_model and run_dir; "
                f"the engine's settings belong to {engine_model}"
            )
        socket_path = run_dir.socket_path(self._run_dir, engine_model)
        self._front_end = FrontEnd(socket_path)
        deadline = time.monotonic() + ATTACH_TIMEOUT_S
        while not self._front_end.wait_ready(timeout_s=0.5):
            failure = run_dir.read_failure(self._run_dir, engine_model)
            if failure is not None:
                self._clear(engine_model)
                raise UnavailableError(
                    f"{engine_model} could not start its engine: {failure.message}"
                ) from failure
            if run_dir.owner_has_died(self._run_dir, engine_model):
                self._clear(engine_model)
                raise UnavailableError(f"{engine_model} has died before its engine was ready; see the log")
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"no engine of {engine_model} on {paths.to_text(socket_path)} "
                    f"within {ATTACH_TIMEOUT_S:g} s"
                )


def _request_id(request: Any) -> str:
    """The client's name for the request; empty if it has none that can be read."""
    try:
        return str(request.request_id())
    except UnicodeDecodeError:
        return ""


def _read(request: Any) -> tuple[Tensors, str]:
    """A request's inputs, copied since Triton reuses their memory when `execute` returns, and its
    parameters."""
    tensors: Tensors = {}
    for name in protocol.INPUTS:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            tensors[name] = tensor.as_numpy().copy()
    try:
        return tensors, request.parameters()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError("a parameter's value is not UTF-8; send UTF-8 text") from error
