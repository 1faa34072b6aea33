"""The faults: each is put into a server under load and returns the report of its clients."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from manylora_client import Client, ManyloraClientError, NotFound, Unavailable

from bench.campaigns.faults.anatomy import (
    DONE_S,
    Remains,
    engine_of,
    stub_of,
    tritonserver_of,
    wait_until_gone,
)
from bench.campaigns.faults.load import PROMPT, Bed, Report

LONG = 1200
"""Tokens of a load that a fault always meets, of a small model, too."""
MAX_ANSWER = 2000
"""Tokens that nothing computes in a second."""
SLOW = 64
"""Tokens that the engine has computed long before a slow client reads the last."""


def engine_killed(bed: Bed) -> Report:
    """As the kernel does when memory runs out."""
    return bed.suffer(
        "engine killed (SIGKILL)",
        lambda: os.kill(engine_of(bed.server), signal.SIGKILL),
        max_tokens=LONG,
    )


def engine_stopped(bed: Bed) -> Report:
    return bed.suffer(
        "engine stopped (SIGSTOP)",
        lambda: os.kill(engine_of(bed.server), signal.SIGSTOP),
        max_tokens=LONG,
    )


def engine_killed_at_start(bed: Bed) -> Report:
    """Its successor is killed too, the one after that stopped, both before they are ready."""

    def inject() -> None:
        pid = engine_of(bed.server)
        os.kill(pid, signal.SIGKILL)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            pid = engine_of(bed.server, other_than=pid)
            os.kill(pid, number)
        wait_until_gone([pid])

    return bed.suffer("engine killed, then killed and stopped at start", inject, max_tokens=LONG)


def engine_killed_while_it_loads(bed: Bed, adapter_root: Path, source: str, num_adapters: int = 4) -> Report:
    """Killed when it has just been asked for adapters that it must read first."""
    names = [f"late-{i}" for i in range(num_adapters)]
    for name in names:
        shutil.copytree(adapter_root / source, adapter_root / name, dirs_exist_ok=True)

    def inject() -> None:
        with bed.connect() as client:
            streams = [client.stream(PROMPT, adapter_id=name, max_tokens=LONG) for name in names]
            os.kill(engine_of(bed.server), signal.SIGKILL)
            for stream in streams:
                _end(stream.collect)

    return bed.suffer("engine killed while it loads adapters", inject, max_tokens=LONG)


def engine_out_of_memory(bed: Bed) -> Report:
    """It may take hardly more memory than it has when long prompts come."""

    def inject() -> None:
        pid = engine_of(bed.server)
        words = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        used_bytes = int(words["VmSize"].split()[0]) * 1024
        unlimited = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (used_bytes + (4 << 20), unlimited[1]))
        with bed.connect() as client:
            ids = list(range(1000, 2900))
            for _ in range(3):
                _end(lambda: client.generate(input_ids=ids, max_tokens=1))
        try:
            resource.prlimit(pid, resource.RLIMIT_AS, unlimited)
        except ProcessLookupError:
            return  # It has ended, and been started again without the limit.

    return bed.suffer("allocations fail in the engine (RLIMIT_AS)", inject)


def front_end_killed(bed: Bed, model: str) -> Report:
    return bed.suffer(
        f"front end {model} killed (SIGKILL)",
        lambda: os.kill(stub_of(bed.server, model), signal.SIGKILL),
        max_tokens=LONG,
    )


def front_end_stopped(bed: Bed, model: str) -> Report:
    return bed.suffer(
        f"front end {model} stopped (SIGSTOP)",
        lambda: os.kill(stub_of(bed.server, model), signal.SIGSTOP),
        max_tokens=LONG,
    )


def tritonserver_killed(bed: Bed) -> Report:
    return bed.suffer(
        "tritonserver killed (SIGKILL)",
        lambda: os.kill(tritonserver_of(bed.server), signal.SIGKILL),
        max_tokens=LONG,
    )


def server_terminated(bed: Bed) -> Report:
    """`manylora serve` is asked to stop. The time of recovery is that of the end of its last process."""
    remains = Remains.of(bed.server)

    def inject() -> None:
        os.kill(bed.server.pid, signal.SIGTERM)
        wait_until_gone([bed.server.pid, *remains.pids])

    report = bed.suffer("manylora serve stopped (SIGTERM)", inject, max_tokens=LONG, is_last=True)
    assert remains.left() == []
    return report


def queue_full(bed: Bed) -> Report:
    """The load alone is more than a server with a small `max_waiting` takes."""
    return bed.suffer("queue full", lambda: None)


def deadlines_pass(bed: Bed) -> Report:
    """Two clients allow too little time: for one it passes at once, for the other in its answer."""

    def inject() -> None:
        with bed.connect() as client:
            for deadline_ms in (1, 1500):
                message = "max_waiting"
                # The load may fill a small server's queue.
                while "max_waiting" in message:
                    with pytest.raises(Unavailable) as caught:
                        client.generate(
                            PROMPT, max_tokens=MAX_ANSWER, ignore_eos=True, deadline_ms=deadline_ms
                        )
                    message = caught.value.message
                assert message.startswith(f"deadline_ms={deadline_ms} passed")

    return bed.suffer("deadlines pass", inject)


def clients_leave(bed: Bed, num_requests: int = 1000) -> Report:
    """One client sends many requests, others begin to read, and all go away."""

    def inject() -> None:
        with Client(bed.server.grpc, "grpc") as many:
            streams = [many.stream(PROMPT, max_tokens=LONG) for _ in range(num_requests)]
            for stream in streams:
                stream.close()
        for address, protocol in ((bed.server.http, "http"), (bed.server.grpc, "grpc")):
            with Client(address, protocol) as client:  # type: ignore[arg-type]
                stream = client.stream(PROMPT, max_tokens=LONG)
                next(stream)
                stream.close()

    return bed.suffer(f"clients leave, one with {num_requests} requests", inject)


def adapter_files_change_while_serving(bed: Bed, adapter_root: Path) -> Report:
    """Those of adapters in use: one is replaced, one truncated in place, one deleted.

    Whoever asks while they are so gets the old version of the truncated one, and in the end NOT_FOUND for the
    deleted one; what the load runs ends as it began.
    """
    replaced, truncated, deleted = (adapter_root / name for name in bed.names[1:4])
    kept = adapter_root.with_name("kept")
    shutil.copytree(adapter_root, kept)

    def harm() -> None:
        fresh = replaced / "fresh"
        shutil.copyfile(truncated / "adapter_model.safetensors", fresh)
        fresh.replace(replaced / "adapter_model.safetensors")
        os.truncate(truncated / "adapter_model.safetensors", 100)
        shutil.rmtree(deleted)

    def inject() -> None:
        harm()
        try:
            with bed.connect() as client:
                _await_not_found(client, deleted.name, truncated.name, bed.right[truncated.name])
        finally:
            shutil.copytree(kept, adapter_root, dirs_exist_ok=True)

    try:
        return bed.suffer("files of adapters in use replaced, truncated, deleted", inject)
    finally:
        shutil.rmtree(kept)


def _await_not_found(client: Client, gone: str, harmed: str, right: list[int]) -> None:
    """Ask for both until the one is not found; all the time the other's old version answers."""
    deadline = time.monotonic() + DONE_S
    while time.monotonic() < deadline:
        asked = {"max_tokens": len(right), "ignore_eos": True}
        assert client.generate(PROMPT, adapter_id=harmed, **asked).token_ids == right
        try:
            client.generate(PROMPT, adapter_id=gone, max_tokens=1)
        except NotFound:
            return
    raise AssertionError(f"{gone} is served for ever")


def adapter_files_change_while_loading(bed: Bed, adapter_root: Path, source: str) -> Report:
    """Adapters are asked for and changed at the same moment, in every way."""
    changes: dict[str, Callable[[Path], None]] = {
        "truncated": lambda path: os.truncate(path / "adapter_model.safetensors", 5000),
        "deleted": shutil.rmtree,
        "overwritten": lambda path: _overwrite(path / "adapter_model.safetensors"),
        "torn": lambda path: os.truncate(path / "adapter_config.json", 10),
    }
    for change in changes:
        shutil.copytree(adapter_root / source, adapter_root / f"changing-{change}")

    def inject() -> None:
        with bed.connect() as client:
            for change, apply in changes.items():
                name = f"changing-{change}"
                stream = client.stream(PROMPT, adapter_id=name, max_tokens=4)
                apply(adapter_root / name)
                _end(stream.collect)

    return bed.suffer("files of adapters changed while they are read", inject)


def slow_reader(bed: Bed, num_turns: int = 3) -> Report:
    """A client whose answer waits for it, while those of others come and go. Log probabilities make the
    answer longer than what lies between client and server, so that it waits in the server."""

    def inject() -> None:
        with bed.connect() as client:
            stream = client.stream(PROMPT, max_tokens=SLOW, ignore_eos=True, logprobs=20)
            ids = next(stream).token_ids
            for _ in range(num_turns):
                client.generate(PROMPT, max_tokens=2)
                ids += next(stream).token_ids
            ids += [i for chunk in stream for i in chunk.token_ids]
            assert len(ids) == SLOW
            right = bed.right[""]
            assert ids[: len(right)] == right

    return bed.suffer("a client reads slowly", inject)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 4096)


def _end(ask: Callable[[], object]) -> None:
    """Wait for an answer or an error of ours; either is an end."""
    try:
        ask()
    except ManyloraClientError:
        return
