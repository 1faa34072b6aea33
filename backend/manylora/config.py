"""The engine's configuration, read once from the `parameters` of config.pbtxt or from keywords."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from manylora import paths
from manylora.errors import InvalidArgumentError, UnsupportedError

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_SIZE = re.compile(r"(\d+)\s*([KMGT]i?B?|B)?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What one engine serves, and within which limits.

    The strings under the fields are what users read, in `--help` and in README.md (`settings_table.py`). The
    sentence `0: ...` (or whatever the default is) says what the default comes to.
    """

    base_model: str
    """Directory of the base model in Hugging Face format; also --base-model."""
    adapter_root: str = ""
    """Directory that holds one directory per adapter, as PEFT saves them; also --adapter-root. Empty: no
    adapters."""

    max_loras: int = 8
    """Distinct adapters in one step; times max_lora_rank, the device pool, of which about 2% at rank 64 are
    for factors and addends of outputs. Costs device memory."""
    max_lora_rank: int = 64
    """Highest rank accepted. Costs device memory."""
    max_cpu_loras: int = 0
    """Adapters kept in host memory, at least max_loras. Costs RAM. 0: four times max_loras."""
    lora_extra_vocab_size: int = 0
    """Tokens an adapter may add to the vocabulary. Above 0 is not served yet."""
    lora_dtype: str = "auto"
    """auto (the base model's), float32, float16 or bfloat16."""
    fully_sharded_loras: bool = False
    """With tensor parallelism, shard both A and B."""
    preload_adapters: tuple[str, ...] = ()
    """Names with commas: adapters loaded to the host cache at start. One that fails stops the first start;
    when a server starts its engine again, it fails alone. Empty: none."""
    pinned_adapters: tuple[str, ...] = ()
    """Names with commas: adapters loaded at start and never evicted from the host cache or the device pool.
    What fails when the engine is started again is pinned as soon as it loads. Empty: none."""

    adapter_settle_s: float = 1.0
    """Seconds that an adapter's files must have been left alone before they are read as a new version. A new
    adapter is not served before that either."""
    adapter_check_s: float = 2.0
    """Seconds after which a request has an adapter's files looked at again for changes. 0: each request waits
    for a look. Negative: never."""

    dtype: str = "auto"
    """auto (the checkpoint's), float32, float16 or bfloat16."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda or cuda:N."""
    tensor_parallel_size: int = 1
    """Devices the model is split over. Above 1 is not served yet."""
    max_model_len: int = 0
    """Most tokens of a sequence, prompt and generated. 0: the base model's, at most 8192, and as much as
    its rope scaling can be served for."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids with commas: the tokens that end a sequence. Empty: all that generation_config.json, config.json
    and the tokenizer name."""
    compile_model: str = "auto"
    """Whether torch compiles the model's small operators at start: auto (on CUDA), true or false. Costs a
    minute or two of the first start."""
    num_threads: int = 0
    """CPU threads of the step. 0: as many as the affinity mask and the control group's quota allow."""

    max_num_seqs: int = 64
    """Sequences that run at once."""
    max_batched_tokens: int = 2048
    """Tokens of one step: prefill chunks and decodes together."""
    kv_cache_bytes: int = 0
    """Memory of the KV cache, in bytes or with K, M, G, T; holds at least one whole sequence. 0: on a CPU
    max_num_seqs x 1024 tokens, on CUDA what gpu_memory_utilization leaves."""
    gpu_memory_utilization: float = 0.9
    """Share of a CUDA device's memory that this engine may take for all it holds, up to 1. What weights,
    device pool, steps and graphs leave of it is the KV cache, unless kv_cache_bytes gives its size."""
    kv_block_size: int = 16
    """Tokens of one KV block."""
    max_waiting: int = 1024
    """Sequences that may wait while max_num_seqs run; one more is refused with UNAVAILABLE, whatever its
    priority."""
    enable_prefix_caching: bool = True
    """Reuse KV blocks of a shared prefix under the same adapter version."""
    enforce_eager: bool = False
    """On CUDA, record no decode steps as graphs at start: that saves seconds and device memory, and costs
    speed. Without effect on a CPU."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_cpu_loras(self) -> int:
        """`max_cpu_loras` with its default resolved."""
        return self.max_cpu_loras or 4 * self.max_loras

    @classmethod
    def from_strings(cls, values: Mapping[str, str]) -> EngineConfig:
        """Read a configuration whose values are text, as config.pbtxt and `--set KEY=VALUE` give it.

        Raises:
            InvalidArgumentError: an unknown key, a value of the wrong type or out of range.
            UnsupportedError: a value that this build does not serve.
        """
        types_by_name = typing.get_type_hints(cls)
        unknown = sorted(set(values) - set(types_by_name))
        if unknown:
            raise InvalidArgumentError(
                f"unknown configuration key {', '.join(unknown)}; "
                f"known are {', '.join(sorted(types_by_name))}"
            )
        return cls(**{key: _parse(key, text, types_by_name[key]) for key, text in values.items()})

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """The inverse of `to_json`."""
        read = json.loads(text)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in read.items()}
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def _parse(key: str, text: str, kind: Any) -> Any:
    text = text.strip()
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise InvalidArgumentError(f"{key}={text!r}: expected true or false")
    if kind is int:
        if key.endswith("_bytes"):
            return parse_size(key, text)
        try:
            return int(text)
        except ValueError:
            raise InvalidArgumentError(f"{key}={text!r}: expected an integer") from None
    if kind is float:
        return _parse_float(key, text)
    if isinstance(kind, types.GenericAlias):
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        if typing.get_args(kind)[0] is not int:
            return parts
        if not all(part.isdecimal() and part.isascii() for part in parts):
            raise InvalidArgumentError(f"{key}={text!r}: expected integers, separated by commas")
        return tuple(map(int, parts))
    return text


def parse_size(key: str, text: str) -> int:
    """Bytes, of a number with or without K, M, G, T.

    Raises:
        InvalidArgumentError: it is none.
    """
    size = _SIZE.fullmatch(text)
    if not size:
        raise InvalidArgumentError(f"{key}={text!r}: expected bytes, as a number with or without K, M, G, T")
    return int(size[1]) * _SIZE_UNITS[(size[2] or "").upper()[:1]]


def _parse_float(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidArgumentError(f"{key}={text!r}: expected a finite number")
    return value


def _check(config: EngineConfig) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type == "int" and value < 0:
            raise InvalidArgumentError(f"{f.name}={value}: must not be negative")
    for name in ("adapter_settle_s", "adapter_check_s"):
        value = getattr(config, name)
        if not math.isfinite(value) or (value < 0 and name == "adapter_settle_s"):
            allowed = "not be negative" if name == "adapter_settle_s" else "be finite"
            raise InvalidArgumentError(f"{name}={value:g}: must {allowed}")
    for name in (
        "max_loras",
        "max_lora_rank",
        "max_num_seqs",
        "max_batched_tokens",
        "kv_block_size",
        "max_waiting",
    ):
        if getattr(config, name) < 1:
            raise InvalidArgumentError(f"{name}={getattr(config, name)}: must be at least 1")
    if not 0 < config.gpu_memory_utilization <= 1:
        raise InvalidArgumentError(
            f"gpu_memory_utilization={config.gpu_memory_utilization:g}: must be above 0 and at most 1"
        )
    if not config.base_model:
        raise InvalidArgumentError("base_model is empty: give the directory of the base model")
    if config.max_cpu_loras and config.max_cpu_loras < config.max_loras:
        raise InvalidArgumentError(
            f"max_cpu_loras={config.max_cpu_loras}: must be at least max_loras={config.max_loras}, "
            "since every adapter on the device is also held in host memory"
        )
    if config.max_batched_tokens < config.max_num_seqs:
        raise InvalidArgumentError(
            f"max_batched_tokens={config.max_batched_tokens}: must be at least "
            f"max_num_seqs={config.max_num_seqs}, or running sequences would starve"
        )
    for name in ("dtype", "lora_dtype"):
        if getattr(config, name) not in ("auto", "float32", "float16", "bfloat16"):
            raise InvalidArgumentError(
                f"{name}={getattr(config, name)!r}: expected auto, float32, float16 or bfloat16"
            )
    if config.compile_model not in ("auto", "true", "false"):
        raise InvalidArgumentError(f"compile_model={config.compile_model!r}: expected auto, true or false")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise InvalidArgumentError(f"device={config.device!r}: expected auto, cpu, cuda or cuda:N")
    if config.lora_extra_vocab_size > 0:
        raise UnsupportedError(
            f"lora_extra_vocab_size={config.lora_extra_vocab_size}: added vocabulary is not served yet; use 0"
        )
    if config.tensor_parallel_size != 1:
        raise UnsupportedError(
            f"tensor_parallel_size={config.tensor_parallel_size}: tensor parallelism is not served yet; use 1"
        )
    if any(token_id < 0 for token_id in config.eos_token_ids):
        raise InvalidArgumentError(f"eos_token_ids={config.eos_token_ids}: ids are not negative")
    for name in (*config.preload_adapters, *config.pinned_adapters):
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidArgumentError(f"adapter name {name!r}: must match {ADAPTER_NAME.pattern}")
    if (config.preload_adapters or config.pinned_adapters) and not config.adapter_root:
        raise InvalidArgumentError("preload_adapters and pinned_adapters need adapter_root")
    if len(set(config.pinned_adapters)) > config.max_loras:
        raise InvalidArgumentError(
            f"pinned_adapters names {len(set(config.pinned_adapters))} adapters; "
            f"at most max_loras={config.max_loras}"
        )


def resolve_directory(path: str, what: str) -> Path:
    """An existing directory, or an error that names the setting.

    Raises:
        InvalidArgumentError: `path` is no directory, or one that cannot be looked at.
    """
    try:
        found = paths.from_text(path).expanduser()
        is_directory, resolved = found.is_dir(), found.resolve()
    except OSError as error:
        raise InvalidArgumentError(f"{what}={path!r}: {error.strerror or error}") from error
    except (RuntimeError, ValueError) as error:
        # A home directory that cannot be told, a loop of links, a null character.
        raise InvalidArgumentError(f"{what}={path!r}: {error}") from error
    if not is_directory:
        raise InvalidArgumentError(f"{what}={path!r}: no such directory")
    return resolved
