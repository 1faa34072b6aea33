"""The base model's weights are the engine's own, whatever becomes of their files."""

from __future__ import annotations

import mmap
import os
import queue
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from manylora import run_dir
from manylora.config import EngineConfig
from manylora.ipc import EngineConnection, Event
from manylora.messages import Failed, Generate, SamplingParams
from manylora.model.own_weights import copy_mapped_weights
from manylora.supervise.engine_process import EngineProcess
from safetensors.torch import load_file, save_file

WAIT_S = 120
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"], ids=["as-stored", "converted"])
def test_an_engine_keeps_its_weights_when_their_file_is_rewritten_and_cut_off(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    weights = tmp_path / "0123abcd"  # a link to a hash, as in a download cache
    shutil.move(base / "model.safetensors", weights)
    (base / "model.safetensors").symlink_to(weights)
    socket = run_dir.socket_path(run_dir.prepare(tmp_path / "run"), "llm")
    process = EngineProcess(
        EngineConfig(base_model=str(base), max_loras=1, max_lora_rank=16, device="cpu", dtype=dtype), socket
    )
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    try:
        process.wait_ready()
        connection = EngineConnection(socket, on_events=events.put, on_lost=lambda: events.put([]))
        assert connection.wait_ready(WAIT_S)

        def ask(number: int) -> list[int]:
            connection.send(Generate(id=number, input_ids=[5, 6, 7], params=PARAMS))
            found: list[int] = []
            while len(found) < PARAMS.max_tokens:
                batch = events.get(timeout=WAIT_S)
                assert batch, "the engine has ended"
                for event in batch:
                    assert not isinstance(event, Failed), event
                    found += event.token_ids
            return found

        wanted = ask(1)
        begin = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        with weights.open("r+b") as file:
            file.seek(begin)
            file.write(bytes(weights.stat().st_size - begin))
        assert ask(2) == wanted
        os.truncate(weights, 0)
        assert ask(3) == wanted
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        assert [line for line in maps if str(weights) in line] == []
        connection.close()
    finally:
        process.stop()


@pytest.mark.parametrize("is_linked", [False, True], ids=["file", "link"])
def test_each_tensor_is_copied_once_and_its_pages_are_given_back(tmp_path: Path, is_linked: bool) -> None:
    path = tmp_path / "model.safetensors"
    # Odd sizes: neighbours share pages of the file.
    stored = {name: torch.randn(rows, 1001) for name, rows in (("a", 7), ("b", 1), ("c", 30))}
    save_file(stored, path)
    if is_linked:  # as a download cache lays it out
        path.symlink_to(path.rename(tmp_path / "0123abcd"))
    module = torch.nn.Module()
    mapped = load_file(path)
    for name in stored:
        module.register_parameter(name, torch.nn.Parameter(mapped.pop(name), requires_grad=False))
    module.tied = module.c
    module.register_buffer("d", torch.ones(3))
    num_bytes = copy_mapped_weights(module)
    os.truncate(path, 0)
    assert num_bytes == sum(tensor.numel() * 4 for tensor in stored.values())
    assert module.tied is module.c
    assert all(torch.equal(module.get_parameter(name), tensor) for name, tensor in stored.items())
    assert str(path.resolve()) not in Path("/proc/self/maps").read_text()
    assert copy_mapped_weights(module) == 0


def test_what_lies_in_no_file_is_not_copied() -> None:
    module = torch.nn.Module()
    module.register_buffer("own", torch.ones(5000))
    module.register_buffer("none", torch.ones(0))
    shared = torch.frombuffer(mmap.mmap(-1, 4 * mmap.PAGESIZE), dtype=torch.float32)
    module.register_buffer("shared", shared)
    where = [buffer.data_ptr() for buffer in module.buffers()]
    assert copy_mapped_weights(module) == 0
    assert [buffer.data_ptr() for buffer in module.buffers()] == where
