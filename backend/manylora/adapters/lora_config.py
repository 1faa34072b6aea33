"""adapter_config.json: what of PEFT's LoraConfig is served, and the refusal of all else.

Source: peft/tuners/lora/config.py and peft/config.py of PEFT 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from manylora.adapters.reasons import Reasons, quote
from manylora.adapters.strict_json import parse_object

MAX_CONFIG_BYTES = 1 << 20

NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
"""Keys that change nothing here: notes, training, initialisation (judged by init_lora_weights), and what only
speaks to kinds that are refused. fan_in_fan_out says how the base weight lies; A and B lie the same way."""

UNSERVED_UNLESS_EMPTY = {
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "lora_bias": "bias in LoRA",
    "modules_to_save": "full training of modules",
    "target_parameters": "LoRA on parameters",
    "trainable_token_indices": "training of single tokens",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
}
"""Kinds that null, false or an empty list switch off."""

UNSERVED_UNLESS_NULL = {
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "megatron_config": "LoRA on Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
}
"""Kinds that only null switches off: to PEFT, {} is a config of defaults."""

SERVED_INIT = ("eva", "gaussian", "mica", "orthogonal")
"""Initialisations that leave the base weights as they are."""

_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_NONE: str | tuple[str, ...] = ()
_READ = frozenset(
    {
        *_REQUIRED,
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "rank_pattern",
        "task_type",
        "use_rslora",
    }
)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The settings of an adapter that decide where it applies and how strongly."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    """A regular expression (or `all-linear`), or names that match the end of a module's path."""
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: frozenset[int] | None
    """None or empty: all layers."""
    layers_pattern: tuple[str, ...]
    rank_pattern: dict[str, int]
    """In the file's order: the first that matches counts."""
    alpha_pattern: dict[str, float]
    base_model_name: str
    """What the adapter says it was trained on. Not checked: names are paths of other machines."""

    def scaling(self, rank: int, alpha: float) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def parse_config(data: bytes, reasons: Reasons) -> LoraConfig | None:
    """Read adapter_config.json.

    Args:
        data: the file.
        reasons: takes what speaks against the adapter.

    Returns:
        The config, which is not to be used if `reasons` is not empty, but can be checked further. None if it
        is too broken for that.

    Raises:
        InvalidArgumentError: the file holds no JSON object.
    """
    values = parse_object(data, "adapter_config.json")
    if values.get("peft_type") not in (None, "LORA"):
        reasons.unsupported(f"peft_type={quote(values['peft_type'])}: only 'LORA' is served")
        return None
    for key in _REQUIRED:
        if values.get(key) is None:
            reasons.invalid("adapter_config.json lacks", key)
    _refuse_kinds(values, reasons)
    fields = _Fields(values, reasons)
    config = LoraConfig(
        r=fields.get("r", 1, _positive, "a positive integer"),
        lora_alpha=fields.get("lora_alpha", 1.0, _finite, "a finite number"),
        use_rslora=fields.get("use_rslora", False, _boolean, "true or false"),
        target_modules=fields.get("target_modules", _NONE, _names, "a regular expression or a list of names"),
        exclude_modules=fields.get(
            "exclude_modules", _NONE, _names, "a regular expression or a list of names"
        ),
        layers_to_transform=fields.get("layers_to_transform", None, _layers, "a layer or a list of layers"),
        layers_pattern=fields.get("layers_pattern", (), _patterns, "a name or a list of names"),
        rank_pattern=fields.get("rank_pattern", {}, _mapping(_positive), "names with positive integers"),
        alpha_pattern=fields.get("alpha_pattern", {}, _mapping(_finite), "names with finite numbers"),
        base_model_name=str(values.get("base_model_name_or_path") or ""),
    )
    _check_layers(config, reasons)
    return None if fields.is_broken else config


class _Fields:
    """Reads one value after the other and notes which are wrong."""

    def __init__(self, values: dict[str, Any], reasons: Reasons) -> None:
        self._values = values
        self._reasons = reasons
        self.is_broken = any(values.get(key) is None for key in _REQUIRED)

    def get(self, key: str, default: _T, parse: Callable[[Any], _T | None], expected: str) -> _T:
        value = self._values.get(key)
        if value is None:
            return default
        result = parse(value)
        if result is None:
            self._reasons.invalid(f"{key}={quote(value)}: expected {expected}")
            self.is_broken = True
            return default
        return result


def _refuse_kinds(values: dict[str, Any], reasons: Reasons) -> None:
    for key, value in values.items():
        if key in UNSERVED_UNLESS_EMPTY:
            if value not in (None, False, [], {}):
                reasons.unsupported(f"{key}={quote(value)}: {UNSERVED_UNLESS_EMPTY[key]} is not served")
        elif key in UNSERVED_UNLESS_NULL:
            if value is not None:
                reasons.unsupported(f"{key}={quote(value)}: {UNSERVED_UNLESS_NULL[key]} is not served")
        elif key not in NO_EFFECT and key not in _READ and value is not None and value is not False:
            reasons.unsupported(f"{quote(key)}={quote(value)}: the key is not known")
    bias = values.get("bias", "none")
    if bias != "none":
        reasons.unsupported(f"bias={quote(bias)}: trained biases are not served, only 'none'")
    task = values.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        reasons.unsupported(f"task_type={quote(task)}: only 'CAUSAL_LM' and null are served")
    _refuse_init(values.get("init_lora_weights", True), reasons)


def _refuse_init(value: Any, reasons: Reasons) -> None:
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    if name in SERVED_INIT:
        return
    if name.startswith(("pissa", "corda")) or name in ("olora", "lora_ga", "loftq"):
        reasons.unsupported(
            f"init_lora_weights={quote(value)}: this initialisation changed the base weights; "
            "where PEFT can convert the adapter, save it with path_initial_model_for_weight_conversion"
        )
    else:
        reasons.unsupported(
            f"init_lora_weights={quote(value)} is not known; served are true, false, {', '.join(SERVED_INIT)}"
        )


def _check_layers(config: LoraConfig, reasons: Reasons) -> None:
    if isinstance(config.target_modules, str):
        for key in ("layers_to_transform", "layers_pattern"):
            if getattr(config, key):
                reasons.invalid(f"{key} cannot be given when target_modules is text instead of a list")
    elif config.layers_pattern and config.layers_to_transform is None:
        reasons.invalid("layers_pattern is given without layers_to_transform")


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _finite(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def _boolean(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _names(value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    return None


def _patterns(value: Any) -> tuple[str, ...] | None:
    names = _names(value)
    return ((names,) if names else ()) if isinstance(names, str) else names


def _layers(value: Any) -> frozenset[int] | None:
    if type(value) is int:
        return frozenset({value})
    if isinstance(value, list) and all(type(layer) is int for layer in value):
        return frozenset(value)
    return None


def _mapping(parse: Callable[[Any], _T | None]) -> Callable[[Any], dict[str, _T] | None]:
    def parse_all(value: Any) -> dict[str, _T] | None:
        if not isinstance(value, dict):
            return None
        parsed = {key: parse(item) for key, item in value.items()}
        return None if None in parsed.values() else parsed  # type: ignore[return-value]  # None is ruled out

    return parse_all
