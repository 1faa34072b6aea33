"""Seeded mutations of a sound adapter: its config, its safetensors file, and what the two files are."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from .file_forms import CONFIG_NAME, FILES, WEIGHTS_NAME
from .malformed import mutate_bytes, mutate_json
from .mutant_values import CONFIG_VALUES, DTYPES, NAMES, NUMBERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """An adapter that may be broken."""

    kind: str
    config: bytes
    weights: bytes
    files: str = ""
    """What a file is instead of a regular one: an entry of FILES, and the file's name behind a colon."""

    @property
    def digest(self) -> str:
        parts = (self.config, self.weights, self.files.encode())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def write(self, directory: Path) -> None:
        """Make the adapter's directory."""
        directory.mkdir(parents=True)
        (directory / CONFIG_NAME).write_bytes(self.config)
        (directory / WEIGHTS_NAME).write_bytes(self.weights)
        if self.files:
            form, _, name = self.files.partition(":")
            FILES[form](directory / name)


class Mutations:
    """Makes mutants of one adapter. A mutant depends on the seed and its index alone."""

    def __init__(self, seed: int, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self._seed = seed
        self._config = dict(config)
        self._weights = save(dict(tensors))
        self._header_bytes = struct.unpack("<Q", self._weights[:8])[0]
        self._kinds: dict[str, tuple[int, Callable[[random.Random], Mutant]]] = {
            "sound": (1, lambda draw: self._mutant("sound")),
            "config value": (14, self._config_value),
            "config JSON": (8, self._config_json),
            "config bytes": (8, self._config_bytes),
            "header bytes": (10, self._header_bits),
            "header JSON": (8, self._header_json),
            "header entry": (14, self._header_entry),
            "header length": (5, self._header_length),
            "key twice": (2, self._key_twice),
            "depth": (2, self._depth),
            "data bytes": (5, self._data),
            "file length": (5, self._length),
            "tensor": (14, self._tensor),
            "tensor name": (8, self._name),
            "file": (4, self._file),
        }

    def mutant(self, index: int) -> Mutant:
        """Mutant number `index`."""
        draw = random.Random(f"{self._seed}:{index}")
        weights = [weight for weight, _ in self._kinds.values()]
        (kind,) = draw.choices(list(self._kinds), weights)
        return self._kinds[kind][1](draw)

    # The config.

    def _config_value(self, draw: random.Random) -> Mutant:
        config = dict(self._config)
        for key in draw.sample(list(CONFIG_VALUES), draw.choice((1, 1, 2))):
            config[key] = draw.choice(CONFIG_VALUES[key])
        return self._mutant("config value", config=_json(config))

    def _config_json(self, draw: random.Random) -> Mutant:
        return self._mutant("config JSON", config=mutate_json(draw, _json(self._config)))

    def _config_bytes(self, draw: random.Random) -> Mutant:
        return self._mutant("config bytes", config=mutate_bytes(draw, _json(self._config)))

    # The container.

    def _header_bits(self, draw: random.Random) -> Mutant:
        found = bytearray(self._weights)
        for _ in range(draw.choice((1, 1, 2, 6))):
            found[draw.randrange(8 + self._header_bytes)] ^= 1 << draw.randrange(8)
        return self._mutant("header bytes", weights=bytes(found))

    def _header_json(self, draw: random.Random) -> Mutant:
        return self._with_header("header JSON", mutate_json(draw, self._header))

    def _header_entry(self, draw: random.Random) -> Mutant:
        header = json.loads(self._header)
        name = draw.choice([name for name in header if name != "__metadata__"])
        field = draw.choice(("dtype", "shape", "data_offsets", "data_offsets", "all"))
        entry = header[name]
        if field == "dtype":
            entry["dtype"] = draw.choice(DTYPES)
        elif field == "shape":
            entry["shape"] = draw.choice(
                (draw.choices(NUMBERS, k=draw.choice((0, 1, 2, 3, 9))), entry["shape"][::-1])
            )
        elif field == "data_offsets":
            begin, end = entry["data_offsets"]
            ways = [
                [end, begin],
                [begin + 4, end + 4],
                [begin, end - 4],
                [begin - 8, end - 8],
                [0, end],
                [-begin, end],
            ]
            entry["data_offsets"] = draw.choice(
                [*ways, draw.choices(NUMBERS, k=2), draw.choices(NUMBERS, k=3)]
            )
        else:
            # Sizes that agree with each other, and with nothing else.
            size = draw.choice((0, 1, 2**31, 2**61, 2**62))
            entry["shape"], entry["data_offsets"] = [size], [0, size * 4]
        return self._with_header("header entry", _json(header))

    def _header_length(self, draw: random.Random) -> Mutant:
        true, total = self._header_bytes, len(self._weights)
        length = draw.choice(
            (0, 1, 2, true - 1, true + 1, true // 2, total, total - 8, 2**22, 2**31, 2**32, 2**63, 2**64 - 1)
        )
        return self._mutant("header length", weights=struct.pack("<Q", length) + self._weights[8:])

    def _key_twice(self, draw: random.Random) -> Mutant:
        header = json.loads(self._header)
        name = draw.choice(list(header))
        again = _json({name: draw.choice(list(header.values()))})
        return self._with_header("key twice", again[:-1] + b"," + self._header.strip()[1:])

    def _depth(self, draw: random.Random) -> Mutant:
        depth = draw.choice((10, 500, 1000, 10_000, 100_000))
        deep = draw.choice(
            (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth)
        )
        if draw.random() < 0.5:
            key = draw.choice((b"__metadata__", b"x", b"dtype"))
            return self._with_header("depth", b'{"' + key + b'":' + deep + b"," + self._header.strip()[1:])
        key = draw.choice((b"target_modules", b"rank_pattern", b"runtime_config", b"r"))
        return self._mutant("depth", config=b'{"' + key + b'":' + deep + b"," + _json(self._config)[1:])

    def _data(self, draw: random.Random) -> Mutant:
        found = bytearray(self._weights)
        for _ in range(draw.choice((1, 4, 100))):
            found[draw.randrange(8 + self._header_bytes, len(found))] ^= 1 << draw.randrange(8)
        return self._mutant("data bytes", weights=bytes(found))

    def _length(self, draw: random.Random) -> Mutant:
        total = len(self._weights)
        keep = draw.choice((0, 1, 7, 8, 9, draw.randrange(total), draw.randrange(total), total - 1))
        weights = draw.choice(
            (self._weights[:keep], self._weights + draw.randbytes(draw.choice((1, 4, 5000))))
        )
        return self._mutant("file length", weights=weights)

    # The tensors.

    def _tensor(self, draw: random.Random) -> Mutant:
        tensors = load(self._weights)
        name = draw.choice(sorted(tensors))
        changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "transposed": lambda t: t.T.contiguous(),
            "a row less": lambda t: t[:-1].contiguous(),
            "a column more": lambda t: torch.cat([t, t[:, :1]], 1),
            "flat": lambda t: t.flatten(),
            "three dimensions": lambda t: t[None],
            "no rows": lambda t: t[:0],
            "a number": lambda t: t.flatten()[0].clone(),
            "zero": torch.zeros_like,
            "NaN": lambda t: t.where(t > 0, math.nan),
            "infinite": lambda t: t * -math.inf,
            "large": lambda t: t * 1e38,
            "tiny": lambda t: t * 1e-44,
            "float64 beyond float32": lambda t: t.double() * 1e200,
            **{
                str(dtype): _to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8)
            },
        }
        tensors[name] = changes[draw.choice(list(changes))](tensors[name])
        return self._mutant("tensor", weights=save(tensors))

    def _name(self, draw: random.Random) -> Mutant:
        tensors = load(self._weights)
        name = draw.choice(sorted(tensors))
        twin = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
        action = draw.choice(("swap", "drop", "drop pair", "rename", "rename", "rename all", "add"))
        if action == "swap":
            tensors[name], tensors[twin] = tensors[twin], tensors[name]
        elif action == "drop":
            del tensors[name]
        elif action == "drop pair":
            del tensors[name], tensors[twin]
        elif action == "add":
            tensors[_renamed(draw, name)] = tensors[name].clone()
        else:
            pattern, put = draw.choice(NAMES)
            chosen = sorted(tensors) if action == "rename all" else [name]
            for each in chosen:
                tensors[re.sub(pattern, put, each, count=1)] = tensors.pop(each)
        return self._mutant("tensor name", weights=save(tensors))

    def _file(self, draw: random.Random) -> Mutant:
        form, name = draw.choice(list(FILES)), draw.choice((CONFIG_NAME, WEIGHTS_NAME))
        return self._mutant("file", files=f"{form}:{name}")

    @property
    def _header(self) -> bytes:
        return self._weights[8 : 8 + self._header_bytes]

    def _with_header(self, kind: str, header: bytes) -> Mutant:
        data = self._weights[8 + self._header_bytes :]
        return self._mutant(kind, weights=struct.pack("<Q", len(header)) + header + data)

    def _mutant(
        self, kind: str, config: bytes | None = None, weights: bytes | None = None, files: str = ""
    ) -> Mutant:
        return Mutant(
            kind=kind,
            config=_json(self._config) if config is None else config,
            weights=self._weights if weights is None else weights,
            files=files,
        )


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(dtype)


def _renamed(draw: random.Random, name: str) -> str:
    pattern, put = draw.choice(NAMES)
    return re.sub(pattern, put, name, count=1)
