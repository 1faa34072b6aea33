"""A front end on a real engine (a tiny random model) behind a real socket, and a responder that records."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from manylora import run_dir
from manylora.config import EngineConfig
from manylora.engine.engine import Engine
from manylora.engine.server import EngineServer
from manylora.errors import ManyloraError
from manylora.front_end import tensor_door
from manylora.front_end.front_end import FrontEnd
from manylora.front_end.protocol import Tensors
from manylora.front_end.text import Tokenizer
from manylora.ipc import query_status

WAIT_S = 60


class Recorder(tensor_door.TensorResponder):
    """Holds what one request was answered, and refuses anything after the last reply, as Triton does."""

    def __init__(self, *, fail_sends: int = 0, is_streaming: bool = True) -> None:
        self.request_id = "r1"
        self.is_streaming = is_streaming
        self.replies: list[Tensors] = []
        self.error: ManyloraError | None = None
        self.num_finals = 0
        self.client_has_gone = False
        self.first = threading.Event()
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._fail_sends = fail_sends

    def send_tensors(self, outputs: Tensors, *, is_last: bool) -> None:
        if self._fail_sends:
            self._fail_sends -= 1
            raise RuntimeError("a fault of the sender")
        assert not self.num_finals
        self.replies.append(outputs)
        self.first.set()
        if is_last:
            self._end()

    def fail(self, error: ManyloraError) -> None:
        assert not self.num_finals
        self.error = error
        self._end()

    def is_cancelled(self) -> bool:
        return self.client_has_gone

    def _end(self) -> None:
        self.num_finals += 1
        self.done.put(None)

    def wait(self) -> Recorder:
        self.done.get(timeout=WAIT_S)
        return self

    @property
    def text(self) -> str:
        return b"".join(reply["text_output"][0, 0] for reply in self.replies).decode()

    @property
    def ids(self) -> list[int]:
        return [int(i) for reply in self.replies for i in reply["output_ids"][0]]

    @property
    def finish_reason(self) -> str:
        return str(self.replies[-1]["finish_reason"][0, 0].decode())


class Setting:
    """An engine that can be stopped and started, and front ends on its socket."""

    def __init__(self, config: EngineConfig, path: Path) -> None:
        self._config = config
        self.path = path
        self.engine: Engine | None = None
        self.server: EngineServer | None = None
        self.front_ends: dict[bool, FrontEnd] = {}
        self.tokenizer = Tokenizer.load(config.base_model)

    def start_engine(self) -> None:
        self.engine = Engine(self._config)
        self.server = EngineServer(self.engine, self.path)

    def stop_engine(self) -> None:
        if self.engine and self.server:
            self.server.close()
            self.engine.close()

    def front_end(self, is_streaming: bool) -> FrontEnd:
        if is_streaming not in self.front_ends:
            self.front_ends[is_streaming] = FrontEnd(self.path)
        assert self.front_ends[is_streaming].wait_ready(WAIT_S)
        return self.front_ends[is_streaming]

    def begin(
        self, is_streaming: bool, prompt: Any = "hi", recorder: Recorder | None = None, **parameters: Any
    ) -> Recorder:
        recorder = recorder or Recorder()
        recorder.is_streaming = is_streaming
        submit(self.front_end(is_streaming), recorder, prompt, **parameters)
        return recorder

    def status(self) -> Any:
        status = query_status(self.path, WAIT_S)
        assert status.check_errors == []
        return status


def submit(front_end: FrontEnd, recorder: Recorder, prompt: Any = "hi", **parameters: Any) -> None:
    """As Triton's models do."""
    tensor_door.submit(front_end, recorder, tensors(prompt), json.dumps(parameters), time.monotonic())


def tensors(prompt: Any) -> Tensors:
    """Text, ids, or a list of texts for a batch."""
    if isinstance(prompt, dict):
        return prompt
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        return {"input_ids": np.array([prompt], dtype=np.int32)}
    texts = [prompt] if isinstance(prompt, str) else prompt
    column = np.empty((len(texts), 1), dtype=np.object_)
    column[:, 0] = [text.encode() for text in texts]
    return {"text_input": column}


@contextlib.contextmanager
def running_setting(base_model: Path, directory: Path) -> Iterator[Setting]:
    """An engine with an empty folder of adapters at `directory / "adapters"`."""
    (directory / "adapters").mkdir()
    config = EngineConfig(
        base_model=str(base_model),
        adapter_root=str(directory / "adapters"),
        max_loras=2,
        max_lora_rank=16,
        num_threads=1,
        max_num_seqs=8,
    )
    setting = Setting(config, run_dir.socket_path(run_dir.prepare(directory / "run"), "llm"))
    setting.start_engine()
    try:
        yield setting
    finally:
        for front_end in setting.front_ends.values():
            front_end.close()
        setting.stop_engine()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Ask again until it is so."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
