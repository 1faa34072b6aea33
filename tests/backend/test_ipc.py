"""The socket between front ends and the engine, with a small engine that only records and echoes."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from manylora import ipc, run_dir
from manylora.engine.server import EngineServer
from manylora.errors import InvalidArgumentError, NotFoundError, UnavailableError
from manylora.ipc import EngineConnection, Event, Outbox, query_status
from manylora.messages import Cancel, EngineInfo, Failed, Generate, Status, Tokens

WAIT_S = 20
INFO = EngineInfo(base_model="/m", max_model_len=9, vocab_size=8, eos_token_ids=[2])
STATUS = Status(adapters=[], counters={"steps": 3}, gauges={"running": 1})


class EchoSession:
    """Answers each Generate with its own ids."""

    def __init__(self, deliver: Callable[[list[Event]], None]) -> None:
        self.deliver = deliver
        self.received: queue.SimpleQueue[Generate | Cancel] = queue.SimpleQueue()
        self.was_closed = threading.Event()

    def send(self, message: Generate | Cancel) -> None:
        self.received.put(message)
        if isinstance(message, Generate):
            self.deliver([Tokens(id=message.id, token_ids=message.input_ids, finish_reason="stop")])

    def close(self) -> None:
        self.was_closed.set()


class EchoEngine:
    def __init__(self) -> None:
        self.info = INFO
        self.sessions: queue.SimpleQueue[EchoSession] = queue.SimpleQueue()

    def connect(self, deliver: Callable[[list[Event]], None]) -> EchoSession:
        session = EchoSession(deliver)
        self.sessions.put(session)
        return session

    def status(self) -> Status:
        return STATUS


class Peer:
    """A front end that records what it is told."""

    def __init__(self, path: Path) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.losses: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.connection = EngineConnection(path, on_events=self._take, on_lost=lambda: self.losses.put(None))

    def _take(self, events: list[Event]) -> None:
        for event in events:
            self.events.put(event)

    def ready(self) -> EngineInfo:
        info = self.connection.wait_ready(WAIT_S)
        assert info is not None
        return info


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return run_dir.socket_path(run_dir.prepare(tmp_path / "run"), "llm")


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def server(engine: EchoEngine, path: Path) -> Iterator[EngineServer]:
    server = EngineServer(engine, path)
    yield server
    server.close()


@pytest.fixture
def peer(path: Path) -> Iterator[Peer]:
    peer = Peer(path)
    yield peer
    peer.connection.close()


def test_a_front_end_learns_of_the_engine_and_gets_its_events(server: EngineServer, peer: Peer) -> None:
    assert peer.ready() == INFO
    peer.connection.send(Generate(id=5, input_ids=[1, 2]))
    assert peer.events.get(timeout=WAIT_S) == Tokens(id=5, token_ids=[1, 2], finish_reason="stop")


def test_a_front_end_may_come_before_the_engine(engine: EchoEngine, path: Path, peer: Peer) -> None:
    assert peer.connection.wait_ready(0) is None
    with pytest.raises(UnavailableError, match="not running"):
        peer.connection.send(Cancel(1))
    server = EngineServer(engine, path)
    try:
        assert peer.ready() == INFO
    finally:
        server.close()


def test_two_front_ends_have_a_session_each(engine: EchoEngine, server: EngineServer, path: Path) -> None:
    peers = [Peer(path), Peer(path)]
    for i, peer in enumerate(peers):
        peer.ready()
        peer.connection.send(Generate(id=1, input_ids=[i]))
        assert peer.events.get(timeout=WAIT_S) == Tokens(id=1, token_ids=[i], finish_reason="stop")
    assert engine.sessions.get(timeout=WAIT_S) is not engine.sessions.get(timeout=WAIT_S)
    for peer in peers:
        peer.connection.close()
        assert peer.events.empty()


def test_the_end_of_the_engine_is_told_once_and_the_next_engine_is_found(path: Path, peer: Peer) -> None:
    first = EngineServer(EchoEngine(), path)
    peer.ready()
    first.close()
    peer.losses.get(timeout=WAIT_S)
    with pytest.raises(UnavailableError, match="not running"):
        peer.connection.send(Generate(id=1, input_ids=[1]))
    engine = EchoEngine()
    second = EngineServer(engine, path)
    try:
        peer.ready()
        peer.connection.send(Generate(id=2, input_ids=[2]))
        assert peer.events.get(timeout=WAIT_S).id == 2
        # Nothing that the first one had not answered reaches the second.
        assert engine.sessions.get(timeout=WAIT_S).received.get(timeout=WAIT_S) == Generate(
            id=2, input_ids=[2]
        )
        assert peer.losses.empty()
    finally:
        second.close()


def test_events_before_the_end_arrive_before_the_loss(path: Path) -> None:
    order: queue.SimpleQueue[str] = queue.SimpleQueue()
    engine = EchoEngine()
    server = EngineServer(engine, path)
    connection = EngineConnection(
        path, on_events=lambda events: order.put("events"), on_lost=lambda: order.put("lost")
    )
    assert connection.wait_ready(WAIT_S)
    engine.sessions.get(timeout=WAIT_S).deliver([Failed(1, "UNAVAILABLE", "the engine is shutting down")])
    server.close()
    assert [order.get(timeout=WAIT_S), order.get(timeout=WAIT_S)] == ["events", "lost"]
    connection.close()


@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "idle"])
def test_a_front_end_that_has_gone_has_its_session_closed(
    engine: EchoEngine, server: EngineServer, path: Path, is_busy: bool
) -> None:
    peer = Peer(path)
    peer.ready()
    session = engine.sessions.get(timeout=WAIT_S)
    peer.connection.close()
    for _ in range(1000 * is_busy):
        session.deliver([Tokens(id=1, token_ids=[1])])
        if session.was_closed.wait(0.01):
            break
    assert session.was_closed.wait(WAIT_S)


def test_messages_of_many_threads_all_arrive_in_each_threads_order(
    engine: EchoEngine, server: EngineServer, peer: Peer
) -> None:
    peer.ready()

    def send(first: int) -> None:
        for i in range(first, first + 200):
            peer.connection.send(Generate(id=i, input_ids=[1]))

    threads = [threading.Thread(target=send, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    ids = [peer.events.get(timeout=WAIT_S).id for _ in range(800)]
    for thread in threads:
        thread.join()
    for n in range(4):
        assert [i for i in ids if i // 1000 == n] == list(range(1000 * n, 1000 * n + 200))


def test_events_that_cannot_be_encoded_end_their_sequences(
    engine: EchoEngine, server: EngineServer, peer: Peer
) -> None:
    peer.ready()
    engine.sessions.get(timeout=WAIT_S).deliver([Failed(7, "NOT_FOUND", "half a pair: \ud800")])
    event = peer.events.get(timeout=WAIT_S)
    assert isinstance(event, Failed)
    assert (event.id, event.code) == (7, "INTERNAL")


def test_a_callback_that_raises_does_not_end_the_connection(server: EngineServer, path: Path) -> None:
    seen: queue.SimpleQueue[int] = queue.SimpleQueue()

    def take(events: list[Event]) -> None:
        seen.put(events[0].id)
        raise RuntimeError("a fault of the front end")

    connection = EngineConnection(path, on_events=take, on_lost=lambda: None)
    assert connection.wait_ready(WAIT_S)
    for i in (1, 2):
        connection.send(Generate(id=i, input_ids=[1]))
        assert seen.get(timeout=WAIT_S) == i
    connection.close()


def test_status_is_answered_to_any_process(server: EngineServer, path: Path) -> None:
    assert query_status(path, WAIT_S) == STATUS
    assert query_status(path, WAIT_S) == STATUS


def test_status_without_an_engine_is_an_error(path: Path) -> None:
    with pytest.raises(UnavailableError, match="there is no socket"):
        query_status(path)
    # What a killed engine leaves: a socket file that nobody listens on.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(UnavailableError, match=r"within 0\.2 s"):
        query_status(path, timeout_s=0.2)


def test_a_stale_socket_is_replaced_and_removed_at_the_end(
    engine: EchoEngine, path: Path, peer: Peer
) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = EngineServer(engine, path)
    assert peer.ready() == INFO
    server.close()
    assert not path.exists()


def test_an_outbox_wakes_its_reader_and_keeps_the_order() -> None:
    outbox: Outbox[int] = Outbox()
    for i in range(10_000):  # more than the bell's buffer holds
        outbox.put(i)
    assert outbox.drain() == list(range(10_000))
    assert outbox.drain() == []
    outbox.close()
    outbox.wake()


def test_a_run_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    made = run_dir.prepare(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    assert run_dir.prepare(made) == made


def test_a_run_directory_that_others_can_open_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o750)
    with pytest.raises(InvalidArgumentError, match="mode 0750; others must be shut out"):
        run_dir.prepare(tmp_path / "open")


def test_a_run_directory_that_is_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match="is a link"):
        run_dir.prepare(tmp_path / "link")
    with pytest.raises(InvalidArgumentError, match="cannot be used"):
        run_dir.prepare(tmp_path / "file")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_run_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, -1)
    with pytest.raises(InvalidArgumentError, match="belongs to user 12345"):
        run_dir.prepare(tmp_path / "theirs")


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    fits = Path("/" + "d" * (107 - len("/") - len("/llm.sock")))
    assert len(str(run_dir.socket_path(fits, "llm"))) == 107
    with pytest.raises(InvalidArgumentError, match="has 108 bytes; allowed are 107"):
        run_dir.socket_path(fits, "llmx")


def test_one_engine_at_a_time_serves_a_socket(path: Path) -> None:
    first = run_dir.lock(path)
    with pytest.raises(UnavailableError, match="another engine serves it"):
        run_dir.lock(path)
    path.touch()
    run_dir.clear(path.parent, "llm")
    assert path.exists()
    os.close(first)
    os.close(run_dir.lock(path))
    run_dir.clear(path.parent, "llm")
    assert not any(path.parent.iterdir())
    run_dir.clear(path.parent / "absent", "llm")


def test_a_failed_start_is_told_to_this_tritonserver_only(path: Path) -> None:
    directory = path.parent
    assert run_dir.read_failure(directory, "llm") is None
    run_dir.write_failure(directory, "llm", NotFoundError("no model"))
    failure = run_dir.read_failure(directory, "llm")
    assert isinstance(failure, NotFoundError)
    assert failure.message == "no model"
    note = directory / "llm.failed"
    note.write_text(note.read_text().replace(str(os.getppid()), "0"))
    assert run_dir.read_failure(directory, "llm") is None
    run_dir.clear(directory, "llm")
    assert not note.exists()
    run_dir.remove(directory)
    assert not directory.exists()


def test_an_owner_that_died_while_it_started_is_told_to_this_tritonserver_only(path: Path) -> None:
    directory = path.parent
    assert not run_dir.owner_has_died(directory, "llm")
    claim = run_dir.claim(directory, "llm")
    assert not run_dir.owner_has_died(directory, "llm")
    with pytest.raises(UnavailableError, match="another server's llm uses it"):
        run_dir.claim(directory, "llm")
    os.close(claim)
    assert run_dir.owner_has_died(directory, "llm")
    # The claim of an earlier tritonserver's.
    (directory / "llm.owner").write_text("0")
    assert not run_dir.owner_has_died(directory, "llm")
    run_dir.clear(directory, "llm")
    assert not any(directory.iterdir())


def test_a_connection_whose_thread_fails_loses_its_requests(
    server: EngineServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(path)
    peer.ready()

    def fail(*_arguments: object) -> None:
        raise OSError("a fault of the socket")

    # The engine's next probe wakes the thread.
    monkeypatch.setattr(ipc, "_receive_all", fail)
    peer.losses.get(timeout=WAIT_S)
    with pytest.raises(UnavailableError, match="not running"):
        peer.connection.send(Generate(id=1, input_ids=[1]))
    peer.connection.close()
