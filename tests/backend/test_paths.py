"""Paths beyond ASCII in a process that takes the encoding of file names for ASCII, as Triton's stubs do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from manylora import paths
from manylora.config import resolve_directory
from manylora.errors import InvalidArgumentError

BASE_MODEL = Path(__file__).resolve().parents[2] / ".build" / "base_model"
IN_A_STUB = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def run_as_in_a_stub(program: str, *words: str) -> str:
    assert "ascii" in _run("import sys; print(sys.getfilesystemencoding())")
    return _run(program, *words)


def _run(program: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        # As a configuration carries it, which is not as a command line does.
        input="\0".join(words).encode(),
        env={**os.environ, **IN_A_STUB},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_a_tokenizer_is_read(tmp_path: Path) -> None:
    odd = tmp_path / "bäse"
    odd.symlink_to(BASE_MODEL)
    real = tmp_path / "reäl"
    real.mkdir()
    for file in BASE_MODEL.iterdir():
        (real / file.name).symlink_to(file)
    program = """
import sys
sys.modules["torch"] = None
from manylora.front_end.text import Tokenizer
for directory in sys.stdin.buffer.read().decode().split("\\0"):
    print(Tokenizer.load(directory).encode("Hello"))
"""
    found = run_as_in_a_stub(program, str(odd), str(real)).split("\n")
    assert found[0] == found[1] == "[19556]"


def test_the_end_tokens_that_a_tokenizer_names_are_read(tmp_path: Path) -> None:
    odd = tmp_path / "bäse"
    odd.mkdir()
    # No generation configuration, which would name them as well.
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (odd / name).symlink_to(BASE_MODEL / name)
    program = """
import sys
from manylora import paths
from manylora.model.end_tokens import resolve_end_tokens
from transformers import PretrainedConfig
directory = paths.from_text(sys.stdin.buffer.read().decode())
print(resolve_end_tokens((), directory, PretrainedConfig(), 10**6))
"""
    eos = json.loads((BASE_MODEL / "tokenizer_config.json").read_text())["eos_token"]
    vocab = json.loads((BASE_MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    assert json.loads(run_as_in_a_stub(program, str(odd))) == [vocab[eos]]


def test_a_directory_is_named_in_its_own_letters() -> None:
    program = """
import sys
from manylora import run_dir, paths
from manylora.config import resolve_directory
from manylora.errors import InvalidArgumentError
text = sys.stdin.buffer.read().decode()
for look in (lambda: resolve_directory(text, "base_model"), lambda: run_dir.prepare(paths.from_text(text))):
    try:
        look()
    except InvalidArgumentError as error:
        sys.stdout.buffer.write(error.message.encode() + b"\\n")
"""
    said = run_as_in_a_stub(program, "/proc/nö such").splitlines()
    assert said[0] == "base_model='/proc/nö such': no such directory"
    assert said[1].startswith("run_dir='/proc/nö such': cannot be used: ")


def test_text_and_path_are_each_others_inverse() -> None:
    for text in ("/plain", "/ü x", "/\udcff"):
        assert paths.to_text(paths.from_text(text)) == text


def test_a_name_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"base_model='/\\udcff': its name is not UTF-8"):
        paths.checked_text(Path(os.fsdecode(b"/\xff")), "base_model")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        pytest.param(lambda tmp: tmp / ("x" * 300), "File name too long", id="too-long"),
        pytest.param(lambda tmp: tmp / "loop", "(Symlink loop|Too many levels|no such directory)", id="loop"),
        pytest.param(lambda tmp: "~no-such-user/x", "home directory", id="no-home"),
        pytest.param(lambda tmp: tmp / "file", "no such directory", id="file"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_error(
    path: Callable[[Path], Path | str], why: str, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match=f"base_model='.*': .*{why}"):
        resolve_directory(str(path(tmp_path)), "base_model")
