"""Which servers `manylora status` finds in a directory where everybody may write."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from manylora import run_dir
from manylora.errors import UnavailableError
from manylora.serve import command, healthcheck
from manylora.serve.ports import Ports
from manylora.serve.records import RECORD, find_running, read
from manylora.serve.workspace import workspace
from manylora.supervise.health import HealthSocket, Stage

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
    sound: Path, temporary: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary / f"manylora-serve-{ME}-a-link").symlink_to(sound)
    (make(temporary, "b-link", None) / RECORD).symlink_to(sound / RECORD)
    os.mkfifo(make(temporary, "c-pipe", None) / RECORD, 0o600)
    (make(temporary, "d-folder", None) / RECORD).mkdir(mode=0o700)
    # By its bare name: a socket's whole path may be longer than 107 bytes.
    monkeypatch.chdir(make(temporary, "e-socket", None))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(RECORD)
        assert find_running(warned.append) == [sound]
    assert len(warned) == 5


def test_a_server_whose_run_directory_is_elsewhere_is_found_while_it_runs(
    temporary: Path, warned: list[str]
) -> None:
    elsewhere = temporary / "elsewhere"
    with workspace(str(elsewhere)) as space:
        assert find_running(warned.append) == []
        space.write_record({"pid": os.getpid(), "run_dir": str(elsewhere), "http": "127.0.0.1:1"})
        assert find_running(warned.append) == [elsewhere]
        assert read(elsewhere)["http"] == "127.0.0.1:1"
    assert find_running(warned.append) == warned == []
    assert [path.name for path in temporary.iterdir()] == ["elsewhere"]


def test_a_record_that_cannot_be_written_stops_no_server(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with workspace(str(temporary / "run")) as space:
        shutil.rmtree(space.path)
        command.announce(Ports(host="127.0.0.1", http=1, grpc=2, metrics=3), space)
    shown = capsys.readouterr()
    assert shown.out.startswith("ready {")
    assert "the record for `manylora status` cannot be written: No such file or directory" in shown.err


@pytest.mark.parametrize("record", [None, "{", "{}", '{"pid": 1}', '{"pid": 1, "http": 2}'])
def test_a_health_check_of_what_is_no_server_says_so(
    temporary: Path, record: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(temporary, "named", record)
    assert healthcheck.main([str(folder)]) == 1
    assert capsys.readouterr().err.startswith(f"{folder}: no server: ")


def test_a_health_check_finds_front_ends_under_a_bare_tritonserver(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert healthcheck.main([]) == 1
    assert "no server of this user runs" in capsys.readouterr().err
    folder = run_dir.prepare(run_dir.default_path(os.getpid()))
    try:
        assert healthcheck.main([]) == 1
        assert "no front end is ready" in capsys.readouterr().err
        answering = HealthSocket(run_dir.health_path(folder, "llm"), {"execute": Stage()})
        assert healthcheck.main([]) == 0
        answering.close()
        run_dir.health_path(folder, "llm").touch()
        assert healthcheck.main([]) == 1
        assert "llm does not say how it is" in capsys.readouterr().err
    finally:
        shutil.rmtree(folder)


def test_a_health_socket_without_a_place_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be made: No such file or directory"):
        HealthSocket(tmp_path / "none" / "llm.live", {})


@pytest.mark.skipif(ME != 0, reason="only root may give files away")
def test_what_belongs_to_another_user_is_passed_over_with_a_warning(
    sound: Path, temporary: Path, warned: list[str]
) -> None:
    record = json.dumps({"pid": os.getpid()})
    os.chown(make(temporary, "a-folder", record), 65534, 65534)
    os.chown(make(temporary, "b-record", record) / RECORD, 65534, 65534)
    assert find_running(warned.append) == [sound]
    assert ["belongs to user 65534" in text for text in warned] == [True, True]
