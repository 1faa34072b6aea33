"""Matches module paths against the regular expressions that an adapter's config may hold.

PEFT accepts regular expressions in several of its settings. An adapter's author may write one that never
ends, and `re` holds the interpreter's lock while it matches: that would stop the engine. So plain names, by
far the most common, are compared without `re`, and the rest is matched in a separate process with a time
limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from manylora.adapters import regex_process
from manylora.adapters.reasons import quote
from manylora.adapters.regex_process import Matches
from manylora.errors import InternalError, InvalidArgumentError

MATCH_LIMIT_S = 5.0
MAX_PATTERNS = 4096
MAX_PATTERN_CHARS = 4096

_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """One expression and how PEFT applies it."""

    setting: str
    """Key of adapter_config.json, for messages."""
    text: str
    """As the config has it."""
    regex: str
    is_whole: bool = False
    """Matches the path to its end (`re.fullmatch`), not only from its start (`re.match`)."""
    is_suffix: bool = False
    """May match after any dot of the path, not only at its start."""
    is_layer: bool = False
    """Yields the layer's index instead of matching to the path's end."""

    @property
    def is_plain(self) -> bool:
        """Whether it has only names and dots, so that it can neither backtrack nor match more characters than
        it has."""
        return _PLAIN.fullmatch(self.text) is not None


def whole_path(setting: str, text: str) -> Pattern:
    """Matches as `re.fullmatch` (PEFT: target_modules and exclude_modules given as text)."""
    return Pattern(setting=setting, text=text, regex=text, is_whole=True)


def path_suffix(setting: str, text: str) -> Pattern:
    """Matches the path or what follows one of its dots (PEFT: keys of rank_pattern and alpha_pattern).

    Source: peft/utils/other.py, get_pattern_key.
    """
    return Pattern(setting=setting, text=text, regex=rf"(.*\.)?({text})$", is_suffix=True)


def layer_index(setting: str, text: str) -> Pattern:
    """Finds the layer's number behind `text` (PEFT: layers_pattern).

    Source: peft/tuners/tuners_utils.py, check_target_module_exists.
    """
    return Pattern(setting=setting, text=text, regex=rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", is_layer=True)


def match_paths(patterns: Sequence[Pattern], paths: Sequence[str]) -> list[Matches]:
    """For each pattern, the paths that it matches, with the layer's index where it captures one.

    Raises:
        InvalidArgumentError: a pattern is not a regular expression, there are too many, or matching takes
            longer than MATCH_LIMIT_S.
    """
    if len(patterns) > MAX_PATTERNS:
        raise InvalidArgumentError(
            f"the config holds {len(patterns)} patterns; at most {MAX_PATTERNS} are read"
        )
    for pattern in patterns:
        if len(pattern.text) > MAX_PATTERN_CHARS:
            raise InvalidArgumentError(
                f"{pattern.setting} has a pattern of {len(pattern.text)} characters, over {MAX_PATTERN_CHARS}"
            )
    expressions = [pattern for pattern in patterns if not pattern.is_plain]
    matched = dict(zip(expressions, _match_in_child(expressions, paths), strict=True)) if expressions else {}
    return [_match_plain(p, paths) if p.is_plain else matched[p] for p in patterns]


def _match_plain(pattern: Pattern, paths: Sequence[str]) -> Matches:
    if pattern.is_layer:
        return regex_process.match(pattern.regex, False, list(paths))
    return {path: "" for path in paths if _is_plain_match(pattern, path)}


def _is_plain_match(pattern: Pattern, path: str) -> bool:
    rest = len(path) - len(pattern.text)
    if rest < 0 or (rest and not (pattern.is_suffix and path[rest - 1] == ".")):
        return False
    tail = path[rest:]
    # A dot of a regular expression matches any character, so q.proj names q_proj too.
    return tail == pattern.text or all(p in (".", c) for p, c in zip(pattern.text, tail, strict=True))


def _match_in_child(patterns: Sequence[Pattern], paths: Sequence[str]) -> list[Matches]:
    regexes = [(p.regex, p.is_whole) for p in patterns]
    request: regex_process.Request = {"regexes": regexes, "texts": list(paths)}
    settings = ", ".join(sorted({p.setting for p in patterns}))
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", regex_process.__file__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=MATCH_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidArgumentError(
            f"matching the regular expressions of {settings} takes over {MATCH_LIMIT_S:g} s; simplify them"
        ) from error
    if child.returncode != 0:
        raise InternalError(
            f"the process that matches {settings} ended with {child.returncode}: {child.stderr}"
        )
    answers: list[Matches | str] = json.loads(child.stdout)
    results: list[Matches] = []
    for pattern, answer in zip(patterns, answers, strict=True):
        if isinstance(answer, str):
            raise InvalidArgumentError(
                f"{pattern.setting} has {quote(pattern.text)}, which is no regular expression: {answer}"
            )
        results.append(answer)
    return results
