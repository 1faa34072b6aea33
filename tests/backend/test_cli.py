"""The command line without a server: plan and validate, exit codes, help."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from manylora import Engine, EngineConfig, cli
from manylora.commands.table import render, size
from manylora.model.outline import outline_model

ROOT = Path(__file__).resolve().parents[2]
BASE_MODEL = ROOT / ".build" / "base_model"
ADAPTERS = ROOT / "examples" / "adapters"
COMMANDS = ("serve", "status", "generate", "chat", "validate", "plan")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command's exit status, and what it printed."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt_oss", "cohere", "gpt2", "qwen3_moe"])
def test_a_plan_is_what_the_engine_takes(
    tiny_model: Callable[..., Path], run: Run, family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    settings = {"max_loras": "3", "max_lora_rank": "32", "kv_block_size": "8", "kv_cache_bytes": "2M"}
    words = [f"--set={key}={value}" for key, value in settings.items()]
    status, out, _ = run("plan", f"--base-model={model}", "--json", *words)
    assert status == 0
    plan = json.loads(out)
    config = EngineConfig.from_strings({"base_model": str(model), "device": "cpu", **settings})
    with Engine(config) as engine:
        assert plan["pool_bytes"] == engine.pool.num_bytes
        assert plan["kv_tokens"] == engine.runner.num_blocks * config.kv_block_size
        assert plan["kv_bytes_per_token"] == engine.model.cache_bytes_per_token()
        assert {int(r): n for r, n in plan["adapters_that_fit"].items()} == {
            r: engine.pool.plan(r) for r in (8, 16, 32)
        }
        assert plan["max_model_len"] == engine.model.max_model_len
        assert outline_model(config).spec == engine.model.spec


def test_a_plan_reads_well_on_a_narrow_terminal(run: Run) -> None:
    status, out, _ = run("plan", f"--base-model={BASE_MODEL}")
    assert status == 0
    assert max(map(len, out.splitlines()), default=0) <= max(80, len(str(BASE_MODEL)) + 20)
    assert "device pool" in out
    assert "q_proj+k_proj+v_proj" in out


def test_a_cache_too_small_is_told_before_anything_is_loaded(run: Run) -> None:
    status, out, err = run("plan", f"--base-model={BASE_MODEL}", "--set=kv_cache_bytes=1M")
    assert (status, out) == (2, "")
    assert "kv_cache_bytes=1048576 holds" in err


def test_good_adapters_are_listed_with_what_they_take(run: Run) -> None:
    status, out, _ = run("validate", ADAPTERS, f"--base-model={BASE_MODEL}")
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["haiku", "ok"],
        ["json", "ok"],
        ["pirate", "ok"],
    ]


def test_one_adapter_is_shown_site_by_site(run: Run) -> None:
    status, out, _ = run("validate", ADAPTERS / "pirate", f"--base-model={BASE_MODEL}")
    assert status == 0
    assert "90 of 90" in out
    assert "scaling    2" in out


def test_every_reason_of_a_refusal_is_listed(run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(ADAPTERS / "haiku", broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    config.update(use_dora=True, bias="all")
    (broken / "adapter_config.json").write_text(json.dumps(config))
    status, out, _ = run("validate", tmp_path, f"--base-model={BASE_MODEL}", "--max-lora-rank=4")
    assert status == 1
    assert "UNSUPPORTED" in out
    reasons = [line for line in out.splitlines() if line.startswith("  - ")]
    assert len(reasons) >= 2
    assert any("use_dora" in reason for reason in reasons)
    status, out, _ = run("validate", tmp_path, f"--base-model={BASE_MODEL}", "--json")
    assert (status, json.loads(out)["ok"], json.loads(out)["code"]) == (1, False, "UNSUPPORTED")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["validate", "/no/such/place"], "no such directory"),
        (["validate", "."], "no adapter"),
        (["plan"], "no base model"),
        (["plan", "--base-model", "."], "no usable config.json"),
        (["plan", "--base-model", ".", "--set", "max_lora=3"], "unknown configuration key max_lora"),
        (["generate", "--set", "nonsense", "hi"], "expected NAME=VALUE"),
        (["generate", "--url", "ftp://x", "hi"], "the scheme is 'ftp'"),
        (["generate"], "no prompt"),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_without_a_traceback(
    run: Run, words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_server_that_is_not_there_is_told(run: Run) -> None:
    status, out, err = run("generate", "--url=localhost:1", "hi")
    assert (status, out) == (1, "")
    assert "connection to localhost:1 failed" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_codes(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "examples:" in out
    assert "exit status: 0 done, 1 failed, 2" in out
    assert max(map(len, out.splitlines())) <= 110


def test_a_reader_that_leaves_early_is_no_error() -> None:
    pipe = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.close()"], stdin=subprocess.PIPE, close_fds=True
    )
    assert pipe.stdin
    pipe.wait()
    assert stat.S_ISFIFO(os.fstat(pipe.stdin.fileno()).st_mode)
    words = ["plan", f"--base-model={BASE_MODEL}", "--json"]
    found = subprocess.run(
        [sys.executable, "-m", "manylora.cli", *words],
        stdout=pipe.stdin,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    pipe.stdin.close()
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert "BrokenPipe" not in found.stderr


def test_a_table_sets_columns_to_their_widest_cell() -> None:
    found = render(("name", "n"), [("a", 1), ("longer", 100)], right=(1,))
    assert found.splitlines() == ["name      n", "a         1", "longer  100"]


def test_sizes_have_the_unit_that_fits() -> None:
    assert [size(n) for n in (0, 999, 2048, 150 * 2**20, 2.5 * 2**30, 3 * 2**40)] == [
        "0 B",
        "999 B",
        "2.0 KiB",
        "150 MiB",
        "2.5 GiB",
        "3.0 TiB",
    ]
