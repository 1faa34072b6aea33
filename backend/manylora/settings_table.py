"""The table of the engine's settings: each key with its default and meaning, for `--help` and for README.md.

It is read from the fields of `EngineConfig` and the strings under them, so a key is described once, where it
is declared. A sentence `DEFAULT: meaning.` in such a string says what the default comes to.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
import textwrap
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from manylora import config
from manylora.config import EngineConfig

DIRECTORIES = ("base_model", "adapter_root")
"""Settings that are options of their own on the command line."""
HELP_WIDTH = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One key."""

    key: str
    default: str
    """As `--set` takes it; empty where it is an empty list or there is none."""
    resolved: str
    """What the default comes to, where that is not the value itself; else empty."""
    meaning: str


@functools.cache
def settings() -> tuple[Setting, ...]:
    """All keys, in the order of their declaration."""
    described = _strings_under_fields()
    return tuple(_setting(f.name, f.default, described[f.name]) for f in fields(EngineConfig))


def help_text() -> str:
    """The keys of `--set`, for `--help`."""
    lines = ["settings (--set KEY=VALUE) and their defaults:"]
    for setting in settings():
        if setting.key not in DIRECTORIES:
            resolved = f" ({setting.resolved})" if setting.resolved else ""
            lines.append(f"  {setting.key}={setting.default}{resolved}")
            lines += textwrap.wrap(
                setting.meaning, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)


def markdown() -> str:
    """The table of README.md."""
    keys = re.compile(rf"\b({'|'.join(setting.key for setting in settings() if '_' in setting.key)})\b")
    rows = ["| key | default | |", "|---|---|---|"]
    for setting in settings():
        default = [f"`{setting.default}`"] if setting.default else []
        default += [setting.resolved] if setting.resolved else []
        texts = [keys.sub(r"`\1`", text) for text in (": ".join(default), setting.meaning)]
        rows.append(f"| `{setting.key}` | {' | '.join(texts)} |".replace("|  |", "| |"))
    return "\n".join(rows) + "\n"


def _strings_under_fields() -> dict[str, str]:
    module = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    (body,) = (
        node.body
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == EngineConfig.__name__
    )
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(below, ast.Expr), f"{field.target.id} has no string under it"
            found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _setting(key: str, value: object, described: str) -> Setting:
    default = "" if value is MISSING else _text(value)
    is_resolved = re.search(rf"(?:^| ){re.escape(default) or 'Empty'}: (.+?)\.(?= |$)", described)
    resolved = is_resolved[1] if is_resolved else ""
    meaning = described.replace(is_resolved[0], "").strip() if is_resolved else described
    return Setting(key=key, default=default, resolved=resolved, meaning=meaning)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)
