"""Which servers `manylora status` finds in a directory where everybody may write."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from manylora.serve.workspace import RECORD, find_running

ME = os.getuid()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def sound(temporary: Path) -> Path:
    """The run directory of a server that is up."""
    return make(temporary, "sound", json.dumps({"pid": os.getpid()}))


@pytest.fixture
def warned() -> list[str]:
    return []


def make(temporary: Path, name: str, record: str | None) -> Path:
    folder = temporary / f"manylora-serve-{ME}-{name}"
    folder.mkdir(mode=0o700)
    if record is not None:
        (folder / RECORD).write_text(record)
        (folder / RECORD).chmod(0o600)
    return folder


def test_one_that_is_up_is_found_and_one_that_has_ended_is_not(
    sound: Path, temporary: Path, warned: list[str]
) -> None:
    make(temporary, "killed", json.dumps({"pid": 1 << 30}))
    make(temporary, "starting", None)
    assert find_running(warned.append) == [sound]
    assert warned == []


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"pid": "1"}',
        '{"pid": true}',
        '{"pid": -1}',
        '{"pid": 1.5}',
        "\0\xff",
        "[" * 60_000,
    ],
    ids=["empty", "torn", "list", "nothing", "text", "bool", "negative", "float", "bytes", "deep"],
)
def test_a_broken_record_is_passed_over_with_a_warning(
    record: str, sound: Path, temporary: Path, warned: list[str]
) -> None:
    folder = make(temporary, "broken", record)
    assert find_running(warned.append) == [sound]
    (text,) = warned
    assert text.startswith(f"{folder}: passed over: ")


def test_what_others_can_write_is_passed_over_with_a_warning(
    sound: Path, temporary: Path, warned: list[str]
) -> None:
    record = json.dumps({"pid": os.getpid()})
    make(temporary, "a-open", record).chmod(0o755)
    (make(temporary, "b-writable", record) / RECORD).chmod(0o622)
    assert find_running(warned.append) == [sound]
    assert ["has mode 0755" in warned[0], "has mode 0622" in warned[1]] == [True, True]


def test_links_and_other_things_in_the_place_of_a_file_are_passed_over(
    sound: Path, temporary: Path, warned: list[str]
) -> None:
    (temporary / f"manylora-serve-{ME}-a-link").symlink_to(sound)
    (make(temporary, "b-link", None) / RECORD).symlink_to(sound / RECORD)
    os.mkfifo(make(temporary, "c-pipe", None) / RECORD, 0o600)
    (make(temporary, "d-folder", None) / RECORD).mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(make(temporary, "e-socket", None) / RECORD))
        assert find_running(warned.append) == [sound]
    assert len(warned) == 5


@pytest.mark.skipif(ME != 0, reason="only root may give files away")
def test_what_belongs_to_another_user_is_passed_over_with_a_warning(
    sound: Path, temporary: Path, warned: list[str]
) -> None:
    record = json.dumps({"pid": os.getpid()})
    os.chown(make(temporary, "a-folder", record), 65534, 65534)
    os.chown(make(temporary, "b-record", record) / RECORD, 65534, 65534)
    assert find_running(warned.append) == [sound]
    assert ["belongs to user 65534" in text for text in warned] == [True, True]
