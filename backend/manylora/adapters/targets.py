"""Which modules of a base model an adapter's config targets, and with which rank and scaling.

Follows PEFT exactly: peft/tuners/tuners_utils.py (check_target_module_exists,
_maybe_include_all_linear_layers), peft/utils/other.py (get_pattern_key) and
peft/tuners/lora/model.py (_create_and_replace) of PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from manylora.adapters.lora_config import LoraConfig
from manylora.adapters.patterns import Pattern, layer_index, match_paths, path_suffix, whole_path
from manylora.adapters.regex_process import Matches
from manylora.model.spec import ModelSpec

ALL_LINEAR = "all-linear"

_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the config says about one module."""

    path: str
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the config says about the base model's modules."""

    linears: dict[str, Target]
    """The served linears that are targeted, by path, in the spec's order."""
    unserved: tuple[str, ...]
    """Targeted modules at which no adapter is served."""
    unmatched: tuple[str, ...]
    """Entries of target_modules, rank_pattern and alpha_pattern that name nothing that is targeted. PEFT
    ignores them too: configs often list the names of several architectures."""


def find_targets(config: LoraConfig, spec: ModelSpec) -> Targets:
    """Apply the config's rules to every module of the base model.

    Raises:
        InvalidArgumentError: a pattern of the config cannot be matched.
    """
    paths = [*spec.linears, *sorted(spec.other_modules)]
    patterns = _Patterns(config, paths)
    named, excluded = _names(config.target_modules), _names(config.exclude_modules)
    chosen = [
        path
        for path in paths
        if not _is_excluded(config, path, excluded, patterns)
        and _is_named(config, spec, path, named, patterns)
    ]
    linears = {}
    for path in chosen:
        if path in spec.linears:
            rank = patterns.value(config.rank_pattern, "rank_pattern", path, config.r)
            alpha = patterns.value(config.alpha_pattern, "alpha_pattern", path, config.lora_alpha)
            linears[path] = Target(path=path, rank=rank, scaling=config.scaling(rank, alpha))
    return Targets(
        linears=linears,
        unserved=tuple(path for path in chosen if path not in spec.linears),
        unmatched=tuple(_unmatched(config, chosen, patterns)),
    )


class _Patterns:
    """All expressions of a config, matched at once."""

    def __init__(self, config: LoraConfig, paths: Sequence[str]) -> None:
        patterns: list[Pattern] = []
        if isinstance(config.target_modules, str) and config.target_modules.lower() != ALL_LINEAR:
            patterns.append(whole_path("target_modules", config.target_modules))
        if isinstance(config.exclude_modules, str):
            patterns.append(whole_path("exclude_modules", config.exclude_modules))
        if config.layers_to_transform:
            patterns += [layer_index("layers_pattern", text) for text in config.layers_pattern]
        patterns += [path_suffix("rank_pattern", key) for key in config.rank_pattern]
        patterns += [path_suffix("alpha_pattern", key) for key in config.alpha_pattern]
        self._matches: dict[tuple[str, str], Matches] = {
            (pattern.setting, pattern.text): matches
            for pattern, matches in zip(patterns, match_paths(patterns, paths), strict=True)
        }

    def of(self, setting: str, text: str) -> Matches:
        return self._matches[setting, text]

    def value(self, values: Mapping[str, _T], setting: str, path: str, default: _T) -> _T:
        """The value of the first key that matches `path`, or of the key that is `path`, or the default."""
        key = next((key for key in values if path in self.of(setting, key)), path)
        return values.get(key, default)


def _names(setting: str | tuple[str, ...]) -> frozenset[str]:
    return frozenset() if isinstance(setting, str) else frozenset(setting)


def _is_excluded(config: LoraConfig, path: str, names: frozenset[str], patterns: _Patterns) -> bool:
    if isinstance(config.exclude_modules, str):
        return bool(config.exclude_modules) and path in patterns.of("exclude_modules", config.exclude_modules)
    return any(suffix in names for suffix in _suffixes(path))


def _is_named(
    config: LoraConfig, spec: ModelSpec, path: str, names: frozenset[str], patterns: _Patterns
) -> bool:
    if isinstance(config.target_modules, str):
        if config.target_modules.lower() == ALL_LINEAR:
            # Linears that are not in the spec cannot be distinguished from norms here. Tensors for them bind
            # to nothing that is served, so an adapter that has some is refused anyway.
            return path in spec.linears
        return path in patterns.of("target_modules", config.target_modules)
    if path in names:
        # Named in full: layers_to_transform does not apply.
        return True
    if not any(suffix in names for suffix in _suffixes(path)):
        return False
    return not config.layers_to_transform or _layer_of(config, path, patterns) in config.layers_to_transform


def _layer_of(config: LoraConfig, path: str, patterns: _Patterns) -> int | None:
    if not config.layers_pattern:
        match = _ANY_LAYER.match(path)
        return int(match["idx"]) if match else None
    found = (patterns.of("layers_pattern", text).get(path) for text in config.layers_pattern)
    index = next((index for index in found if index is not None), None)
    return int(index) if index else None


def _suffixes(path: str) -> Iterator[str]:
    """The path and what follows each of its dots."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def _unmatched(config: LoraConfig, chosen: Sequence[str], patterns: _Patterns) -> Iterator[str]:
    if not isinstance(config.target_modules, str):
        named = {suffix for path in chosen for suffix in _suffixes(path)}
        yield from (name for name in config.target_modules if name not in named)
    for setting, keys in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in keys:
            if not any(path == key or path in patterns.of(setting, key) for path in chosen):
                yield key
