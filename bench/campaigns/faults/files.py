"""Faults of adapters' files: rewritten in place under requests, on a disk that gives no answer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from manylora.serve.background import RunningServer
from manylora_client import Client, ManyloraClientError

from bench.campaigns.faults.anatomy import DONE_S, engine_of
from bench.campaigns.faults.load import PROMPT, RIGHT, WRONG, Bed, Report, Seen
from bench.campaigns.faults.silent_mount import silent_mount

FILES = ("adapter_config.json", "adapter_model.safetensors")
PAUSES_S = (0.0, 0.003, 0.05)
"""Between the two files of a version."""
GAP_S = 2.0
"""Between versions: longer than files must be left alone."""
NUM_CLIENTS = 3
MAX_TOKENS = 8
SETTINGS = ("--set=max_loras=1", "--set=max_cpu_loras=1", "--set=adapter_check_s=0")
"""Of a server with one host slot that looks at the files for each request."""


@dataclass(slots=True)
class Rewriting:
    """What became of an adapter that was rewritten in place."""

    report: Report
    num_written: int
    num_taken_up: int
    """How often answers passed to another version."""
    strays: set[str] = field(default_factory=set)
    """Versions that nobody has published."""


def rewritten_in_place(
    server: RunningServer,
    adapter_root: Path,
    published: Sequence[str],
    *,
    duration_s: float,
    min_taken_up: int = 0,
) -> Rewriting:
    """One adapter takes the contents of others in turn, in its own two files, while clients ask for it.

    Args:
        server: with SETTINGS.
        published: adapters whose contents differ, in both files.
        min_taken_up: a machine that is too busy for so many in that time goes on until it has managed.
    """
    target = adapter_root / "rewritten"
    shutil.copytree(adapter_root / published[0], target)
    over = threading.Event()
    seen: list[Seen] = []
    versions: list[str] = []
    num_written = 0
    with Client(server.grpc, "grpc", timeout=DONE_S) as client:
        right = dict(_ask(client, name) for name in published)
        assert len(right) == len(published), "two adapters are the same"
        # Before the first change: a first load waits until the copy has been left alone.
        _ask(client, target.name)
        lock = threading.Lock()

        def follow() -> None:
            while not over.is_set():
                one = Seen()
                try:
                    version, one.token_ids = _ask(client, target.name)
                    one.outcome = RIGHT if right.get(version) == one.token_ids else WRONG
                except ManyloraClientError as error:
                    version, one.outcome, one.message = "", type(error).__name__, error.message
                with lock:
                    one.ended_at = time.monotonic()
                    seen.append(one)
                    versions.append(version)

        began = time.monotonic()
        threads = [threading.Thread(target=follow) for _ in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        while (passed_s := time.monotonic() - began) < duration_s or (
            passed_s < DONE_S and _num_changes(versions) < min_taken_up
        ):
            num_written += 1
            source = adapter_root / published[num_written % len(published)]
            for name, pause_s in zip(FILES, (PAUSES_S[num_written % len(PAUSES_S)], GAP_S), strict=True):
                _overwrite(target / name, (source / name).read_bytes())
                over.wait(pause_s)
        over.set()
        for thread in threads:
            thread.join(DONE_S)
    report = Report(
        fault=f"an adapter rewritten in place for {duration_s:g} s",
        seen=seen,
        last_end_s=max(one.ended_at for one in seen) - began,
        recovery_s=time.monotonic() - began,
    )
    shutil.rmtree(target)
    return Rewriting(
        report=report,
        num_written=num_written,
        num_taken_up=_num_changes(versions),
        strays=set(versions) - {*right, ""},
    )


def hung_directory(
    bed: Bed, adapter_root: Path, source: str, *, num_reads: int, deadline_ms: int = 0
) -> Report:
    """The directories of some adapters give no answer, while others are served and one is loaded.

    Args:
        source: an adapter that nobody has asked for, or a copy of it.
        num_reads: adapters whose files can be seen and not be read, beside one that cannot even be seen.
        deadline_ms: of those who ask for them; 0: until the server gives up.
    """
    with _hung(adapter_root, num_reads) as names:

        def inject() -> None:
            ends: Counter[str] = Counter()
            threads = [
                threading.Thread(target=lambda n=name: ends.update([_end_of(bed, n, deadline_ms)]))
                for name in names
            ]
            for thread in threads:
                thread.start()
            cold = adapter_root / f"cold-{num_reads}"
            shutil.copytree(adapter_root / source, cold)
            with bed.connect() as client:
                assert client.generate(PROMPT, adapter_id=cold.name, max_tokens=2).adapter_version
                assert client.generate(PROMPT, max_tokens=2).token_ids == bed.right[""][:2]
            for thread in threads:
                thread.join(DONE_S)
            assert ends == {"Unavailable": len(names)}, ends

        return bed.suffer(f"a hung directory and {num_reads} hung reads", inject)


def engine_killed_while_a_read_hangs(bed: Bed, adapter_root: Path) -> Report:
    """No signal ends the thread that waits for the disk, so the engine's process stays, and is replaced."""
    with _hung(adapter_root, 1) as names:
        for name in names:
            assert _end_of(bed, name, 1000) == "Unavailable"

        def inject() -> None:
            pid = engine_of(bed.server)
            os.kill(pid, signal.SIGKILL)
            assert engine_of(bed.server, other_than=pid) != pid

        return bed.suffer("engine killed while reads hang in the kernel", inject, max_tokens=400)


@contextlib.contextmanager
def _hung(adapter_root: Path, num_reads: int) -> Iterator[list[str]]:
    with contextlib.ExitStack() as stack:
        names = ["hung-look", *(f"hung-read-{number}" for number in range(num_reads))]
        for name in names:
            (adapter_root / name).mkdir()
            stack.callback((adapter_root / name).rmdir)
            stack.enter_context(silent_mount(adapter_root / name, shows_files=name != "hung-look"))
        yield names


def _end_of(bed: Bed, name: str, deadline_ms: int) -> str:
    try:
        with bed.connect() as client:
            client.generate(PROMPT, adapter_id=name, max_tokens=2, deadline_ms=deadline_ms)
    except ManyloraClientError as error:
        return type(error).__name__
    return "served"


def _ask(client: Client, name: str) -> tuple[str, list[int]]:
    answer = client.generate(PROMPT, adapter_id=name, max_tokens=MAX_TOKENS, ignore_eos=True)
    return answer.adapter_version, answer.token_ids


def set_alpha(adapter: Path, alpha: int) -> None:
    """Give an adapter a config of its own, which binds to the weights of others of its rank too."""
    path = adapter / FILES[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": alpha}))


def _overwrite(path: Path, data: bytes) -> None:
    """As `cp` does: in the file that is there."""
    with path.open("r+b", buffering=0) as file:
        file.write(data)
        file.truncate()


def _num_changes(versions: Sequence[str]) -> int:
    """How often answers passed to another version; what the one before still had to answer is no passage."""
    changes, current, last = 0, "", ""
    for version in list(versions):
        if version not in ("", current, last):
            changes, last, current = changes + bool(current), current, version
    return changes
