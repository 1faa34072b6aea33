"""The one table of settings: what users read is what the configuration declares."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from manylora import cli, settings_table
from manylora.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]


def test_readme_has_the_table_that_the_configuration_declares() -> None:
    script = ROOT / "scripts" / "readme_settings.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_key_has_its_default_and_its_meaning() -> None:
    table = {setting.key: setting for setting in settings_table.settings()}
    assert list(table) == [field.name for field in dataclasses.fields(EngineConfig)]
    assert all(setting.meaning for setting in table.values())
    written = {key: setting.default for key, setting in table.items() if setting.default}
    assert EngineConfig.from_strings({"base_model": "x", **written}) == EngineConfig(base_model="x")


def test_what_a_default_comes_to_stands_beside_it() -> None:
    table = {setting.key: setting for setting in settings_table.settings()}
    assert table["max_cpu_loras"].resolved == "four times max_loras"
    assert table["max_cpu_loras"].meaning == "Adapters kept in host memory, at least max_loras. Costs RAM."
    assert table["pinned_adapters"].resolved == "none"


@pytest.mark.parametrize("command", ["serve", "plan", "validate"])
def test_help_shows_every_key_of_set(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    for setting in settings_table.settings():
        if setting.key not in settings_table.DIRECTORIES:
            assert f"\n  {setting.key}={setting.default}" in shown
            assert setting.meaning in " ".join(shown.split())


def test_the_template_of_the_model_shows_every_key_with_its_default() -> None:
    text = (ROOT / "model_repository" / "llm" / "config.pbtxt").read_text()
    lines = re.findall(r'^#? ?parameters \{ key: "(\w+)" value: \{ string_value: "(.*)" \} \}$', text, re.M)
    shown = dict(lines)
    assert len(shown) == len(lines)
    not_served_yet = {"lora_extra_vocab_size", "fully_sharded_loras", "tensor_parallel_size"}
    for setting in settings_table.settings():
        if setting.key not in {*settings_table.DIRECTORIES, *not_served_yet}:
            assert shown.get(setting.key) == setting.default
