"""A server all of whose paths have blanks, quotes, a line break and letters beyond ASCII."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from manylora.serve import processes
from manylora.serve.background import RunningServer, running_server

from bench.campaigns.faults.anatomy import tritonserver_of
from bench.campaigns.harness import SYNTHETIC, Peft, connect
from bench.paths import ROOT

ODD = 'ü "q" \'n\n$(x) '
"""A name that a shell, a configuration file and an ASCII locale each read as something else."""
ADAPTER = SYNTHETIC[0]
SET_UP = ROOT / ".build" / "tritonserver" / "bin"


@pytest.fixture(scope="module")
def odd_root(small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd") / ODD / f"adapters {ODD}"
    shutil.copytree(small_root / ADAPTER, root / ADAPTER)
    return root


@pytest.fixture(scope="module")
def odd_server(
    small_model: Path, odd_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    odd_base = odd_root.parent / f"base {ODD}"
    odd_base.mkdir()
    for file in small_model.iterdir():
        (odd_base / file.name).symlink_to(file)
    run_dir = tmp_path_factory.mktemp("r") / ODD
    with pytest.MonkeyPatch.context() as patch:
        # The folder that set-up leaves: its tritonserver is a link.
        patch.setenv("PATH", f"{SET_UP}:{os.environ['PATH']}")
        arguments = [f"--run-dir={run_dir}", f"--set=preload_adapters={ADAPTER}"]
        with running_server(base_model=odd_base, adapter_root=odd_root, arguments=arguments) as server:
            (plain,) = (
                Path(word.partition("=")[2]).parent
                for word in processes.command(tritonserver_of(server))
                if word.startswith("--model-repository=")
            )
            assert plain.is_dir()
            yield server
    assert not plain.exists()
    assert [path.name for path in run_dir.iterdir()] == ["server.log"]


def test_odd_paths_answer_as_plain_ones_do(odd_server, small_model, small_root):
    text = "Why is the sky blue?"
    peft = Peft(small_model, small_root)
    (wanted,) = peft.answers(ADAPTER, [peft.tokenizer(text)["input_ids"]], 8)
    asked = {"adapter_id": ADAPTER, "max_tokens": 8}
    with connect(odd_server) as client:
        whole = client.generate(text, **asked)
        streamed = client.stream(text, **asked).collect()
    assert whole.token_ids == streamed.token_ids == wanted.token_ids
    assert whole.text == streamed.text
    files = [small_root / ADAPTER / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    content = b"".join(path.read_bytes() for path in files)
    assert whole.adapter_version == hashlib.sha256(content).hexdigest()[:32]


def test_odd_paths_are_named_as_they_are(odd_server, odd_root):
    with connect(odd_server) as client, pytest.raises(Exception, match="adapter 'none' is not found"):
        client.generate("x", adapter_id="none", max_tokens=1)
    log = odd_server.log.read_text(encoding="utf-8")
    assert f"base {ODD}: LlamaForCausalLM" in log
    command = [sys.executable, "-m", "manylora.cli", "status", "--run-dir", odd_server.run_dir]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert ADAPTER in shown.stdout
