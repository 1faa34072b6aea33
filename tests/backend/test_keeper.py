"""The keeper starts an engine again whatever happened; the pauses grow until one serves for a while."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from manylora.config import EngineConfig
from manylora.errors import UnavailableError
from manylora.supervise import engine_keeper
from manylora.supervise.engine_keeper import EngineKeeper

PATIENCE_S = 30.0
PATH = Path("llm.sock")
CONFIG = EngineConfig(base_model="base")


@dataclass
class Life:
    """What one engine process does, on a clock that only it moves."""

    load_s: float = 0.0
    serve_s: float = 0.0
    start_error: Exception | None = None
    """Raised instead of becoming ready."""
    watch_error: Exception | None = None
    """Raised to whoever waits for the end."""
    stop_error: Exception | None = None


@dataclass
class World:
    """Takes the place of processes, of the clock and of the keeper's pauses."""

    lives: list[Life]
    now_s: float = 1000.0
    pauses: list[float] = field(default_factory=list)
    num_started: int = 0
    stopped: list[int] = field(default_factory=list)
    """Processes that were told to end."""

    def process(self, config: EngineConfig, socket_path: Path, *, strict_preload: bool) -> Process:
        assert (config, socket_path) == (CONFIG, PATH)
        # An adapter that has broken since the first start must not keep the engine down.
        assert strict_preload == (self.num_started == 0)
        self.num_started += 1
        return Process(self, self.lives[self.num_started - 1], pid=self.num_started)


@dataclass
class Process:
    world: World
    life: Life
    pid: int

    def wait_ready(self) -> None:
        self.world.now_s += self.life.load_s
        if self.life.start_error:
            raise self.life.start_error

    def wait(self) -> int:
        if self.life.watch_error:
            raise self.life.watch_error
        if not self.life.start_error:
            self.world.now_s += self.life.serve_s
        return -9

    def stop(self) -> int:
        self.world.stopped.append(self.pid)
        if self.life.stop_error:
            raise self.life.stop_error
        return -9


class Pauses:
    """The keeper's event: a pause takes no time, and the one behind the last life ends the watch."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True

    def wait(self, timeout: float) -> bool:
        self._world.pauses.append(timeout)
        return self._is_set or self._world.num_started == len(self._world.lives)


def keep(monkeypatch: pytest.MonkeyPatch, *lives: Life) -> World:
    """Let a keeper go through these lives; its thread must come to the end of them."""
    world = World(list(lives))
    monkeypatch.setattr(engine_keeper, "EngineProcess", world.process)
    monkeypatch.setattr(engine_keeper, "time", SimpleNamespace(monotonic=lambda: world.now_s))
    keeper = EngineKeeper(CONFIG, PATH)
    monkeypatch.setattr(keeper, "_is_stopping", Pauses(world))
    keeper.start()
    keeper._thread.join(PATIENCE_S)
    assert not keeper._thread.is_alive()
    assert world.num_started == len(lives), "the watch ended before its time"
    return world


def test_the_pauses_double_until_an_engine_has_served_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    served_s = [5.0, 5.0, 5.0, 61.0, 5.0]
    world = keep(monkeypatch, *(Life(serve_s=s) for s in served_s))
    assert world.pauses == [1.0, 2.0, 4.0, 1.0, 2.0]


def test_the_time_that_a_start_takes_is_none_of_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that loads for minutes and then dies is not tried again each second."""
    world = keep(monkeypatch, *[Life(load_s=300.0, serve_s=1.0)] * 7)
    assert world.pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_start_that_fails_late_does_not_shorten_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Life(load_s=300.0, start_error=UnavailableError("no memory"))
    world = keep(monkeypatch, Life(), failing, failing, failing)
    assert world.pauses == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    "life",
    [
        Life(start_error=ValueError("a bug")),
        Life(start_error=OSError("no more processes")),
        Life(start_error=ValueError("a bug"), stop_error=ValueError("another")),
        Life(watch_error=ValueError("a bug")),
        Life(watch_error=ValueError("a bug"), stop_error=ValueError("another")),
        Life(stop_error=ValueError("a bug")),
    ],
    ids=["start", "resources", "start and stop", "watch", "watch and stop", "stop"],
)
def test_a_fault_that_nobody_foresaw_ends_a_turn_and_not_the_watch(
    life: Life, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        world = keep(monkeypatch, Life(), life, Life())
    assert world.pauses == [1.0, 2.0, 4.0]
    assert 2 in world.stopped
    error = life.start_error or life.watch_error or life.stop_error
    assert str(error) in caplog.text
