"""A server with one host slot whose adapters' files are replaced, rewritten, half there, and gone."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from manylora.serve.background import RunningServer, running_server
from manylora_client import Client, ManyloraClientError, NotFound

from bench.campaigns.faults import files
from bench.campaigns.faults.load import RIGHT
from bench.campaigns.harness import DONE_S, PROMPTS, SYNTHETIC, connect, status_of, wait_idle

PUBLISHED = [f"published-{number}" for number in range(4)]
SWAPS = ["at once", "with a gap", "at once", "with a gap", "at once", "at once"]
NOT_FOUND = "not found"


def publish(small_root: Path, root: Path) -> None:
    """Adapters of which any two files would bind together: of one rank, each with an alpha of its own."""
    for number, name in enumerate(PUBLISHED):
        # Both of rank 8.
        shutil.copytree(small_root / SYNTHETIC[4 * (number % 2)], root / name)
        files.set_alpha(root / name, 8 * (number + 1))


@pytest.fixture(scope="module")
def root(small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("changing") / "adapters"
    root.mkdir()
    publish(small_root, root)
    return root


@pytest.fixture(scope="module")
def server(small_model: Path, root: Path) -> Iterator[RunningServer]:
    with running_server(base_model=small_model, adapter_root=root, arguments=files.SETTINGS) as running:
        yield running


def test_an_adapter_rewritten_in_place_gives_published_versions_only(server: RunningServer, root: Path):
    done = files.rewritten_in_place(server, root, PUBLISHED, duration_s=8, min_taken_up=2)
    print(f"{len(done.report.seen)} answers, {done.num_written} written, {done.num_taken_up} taken up")
    assert done.report.outcomes.keys() == {RIGHT}, done.report.messages
    assert done.strays == set()
    assert done.num_taken_up >= 2
    assert wait_idle(server).check_errors == []


def test_a_replaced_adapter_is_taken_up_while_running_sequences_end_on_theirs(
    server: RunningServer, root: Path
):
    target = root / "replaced"
    shutil.copytree(root / PUBLISHED[0], target)
    asked = {"adapter_id": target.name, "ignore_eos": True}
    with connect(server, "grpc") as client:
        wanted = client.generate(PROMPTS[0], **{**asked, "adapter_id": PUBLISHED[0]}, max_tokens=120)
        stream = client.stream(PROMPTS[0], **asked, max_tokens=120)
        first = next(stream)
        shutil.copytree(root / PUBLISHED[1], root / "new")
        target.rename(root / "old")
        (root / "new").rename(target)
        # Each asks for a look; the first that finds the files settled has them read.
        version = first.adapter_version
        while version == first.adapter_version:
            version = client.generate(PROMPTS[1], **asked, max_tokens=1).adapter_version
        ids = first.token_ids + [i for chunk in stream for i in chunk.token_ids]
    assert ids == wanted.token_ids
    shutil.rmtree(root / "old")


def ask(client: Client, name: str) -> tuple[str, tuple[int, ...]]:
    answer = client.generate(PROMPTS[0], adapter_id=name, max_tokens=8, ignore_eos=True)
    return answer.adapter_version, tuple(answer.token_ids)


@dataclass(frozen=True, slots=True)
class Heard:
    """What one request came to: a version with its right tokens, NOT_FOUND, or what must not be."""

    outcome: str
    asked_s: float
    ended_s: float


@dataclass(slots=True)
class Followers:
    """Clients that ask for one adapter without pause."""

    server: RunningServer
    name: str
    right: dict[str, tuple[int, ...]]
    heard: list[Heard] = field(default_factory=list)
    news: threading.Condition = field(default_factory=threading.Condition)
    over: threading.Event = field(default_factory=threading.Event)

    def follow(self, protocol: str) -> None:
        with connect(self.server, protocol) as client:
            while not self.over.is_set():
                asked_s = time.monotonic()
                try:
                    version, ids = ask(client, self.name)
                    outcome = version if self.right.get(version) == ids else f"{version} answers {ids}"
                except NotFound:
                    outcome = NOT_FOUND
                except ManyloraClientError as error:
                    outcome = f"{type(error).__name__}: {error}"
                with self.news:
                    self.heard.append(Heard(outcome, asked_s, time.monotonic()))
                    self.news.notify_all()

    def wait_for(self, outcome: str) -> None:
        """Wait until a client hears so from now on."""
        with self.news:
            known = len(self.heard)
            heard = self.news.wait_for(
                lambda: outcome in [one.outcome for one in self.heard[known:]], timeout=DONE_S
            )
        assert heard, f"not heard: {outcome}"


def test_an_adapter_swapped_by_renames_under_requests_gives_published_versions_only(
    server: RunningServer, root: Path
):
    target = root / "swapped"
    sources = [PUBLISHED[number % len(PUBLISHED)] for number in range(len(SWAPS) + 1)]
    shutil.copytree(root / sources[0], target)
    for number, source in enumerate(sources):
        shutil.copytree(root / source, root / f"swap-{number}")
    gaps = []
    with connect(server) as client, ThreadPoolExecutor(4) as pool:
        versions = {name: ask(client, name) for name in PUBLISHED}
        followers = Followers(server, target.name, right=dict(versions.values()))
        assert len(followers.right) == len(PUBLISHED), "two adapters are the same"
        ends = [pool.submit(followers.follow, protocol) for protocol in ("http", "grpc") * 2]
        try:
            followers.wait_for(versions[sources[0]][0])
            for number, way in enumerate(SWAPS, start=1):
                (root / f"swap-{number}").rename(root / "next")
                began_s = time.monotonic()
                target.rename(root / f"old-{number}")
                if way == "with a gap":
                    followers.wait_for(NOT_FOUND)
                (root / "next").rename(target)
                gaps.append((began_s, time.monotonic()))
                # The last but one is followed by the last while it waits to be left alone.
                if number != len(SWAPS) - 1:
                    followers.wait_for(versions[sources[number]][0])
        finally:
            followers.over.set()
        for end in ends:
            end.result(DONE_S)
        assert ask(client, target.name) == versions[sources[-1]]
    print(f"{len(followers.heard)} answers")
    assert {one.outcome for one in followers.heard} == {*followers.right, NOT_FOUND}
    for one in followers.heard:
        if one.outcome == NOT_FOUND:
            assert any(one.asked_s <= end_s and one.ended_s >= began_s for began_s, end_s in gaps), one
    assert wait_idle(server).check_errors == []


def test_files_that_have_become_invalid_leave_the_old_version_serving(server: RunningServer, root: Path):
    target = root / "harmed"
    shutil.copytree(root / PUBLISHED[2], target)
    with connect(server) as client:
        before = client.generate(PROMPTS[0], adapter_id=target.name, max_tokens=4)
        (target / "adapter_config.json").write_text("{")
        while not any(a.files_error for a in status_of(server).adapters):
            answer = client.generate(PROMPTS[0], adapter_id=target.name, max_tokens=4)
            assert (answer.adapter_version, answer.token_ids) == (before.adapter_version, before.token_ids)
    assert f"adapter '{target.name}': adapter_config.json is not JSON" in server.log.read_text()


def test_an_adapter_whose_directory_is_deleted_is_not_found(server: RunningServer, root: Path):
    target = root / "deleted"
    shutil.copytree(root / PUBLISHED[3], target)
    with connect(server) as client:
        client.generate(PROMPTS[0], adapter_id=target.name, max_tokens=1)
        shutil.rmtree(target)
        with pytest.raises(NotFound, match="adapter 'deleted' is not found"):
            client.generate(PROMPTS[0], adapter_id=target.name, max_tokens=1)
    assert target.name not in [adapter.name for adapter in wait_idle(server).adapters]


def test_a_half_uploaded_adapter_is_served_by_the_first_request_after_its_upload(
    server: RunningServer, root: Path
):
    source, target = root / PUBLISHED[0], root / "uploaded"
    target.mkdir()
    whole = (source / "adapter_model.safetensors").read_bytes()
    with connect(server) as client:
        for data in (None, whole[:1000], whole[: len(whole) // 2]):
            if data is not None:
                shutil.copy(source / "adapter_config.json", target)
                (target / "adapter_model.safetensors").write_bytes(data)
            for _ in range(10):
                with pytest.raises(ManyloraClientError):
                    client.generate(PROMPTS[0], adapter_id=target.name, max_tokens=1)
        (target / "adapter_model.safetensors").write_bytes(whole)
        assert client.generate(PROMPTS[0], adapter_id=target.name, max_tokens=1).adapter_version
