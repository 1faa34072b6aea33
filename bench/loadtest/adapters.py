"""The adapters of a run: synthetic ones, made for it, or those of a directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import AutoConfig

from examples.make_adapters import make_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSet:
    """Adapters in one directory."""

    root: Path
    names: list[str]
    ranks: list[int]

    @property
    def rank_label(self) -> str:
        """`16`, or `8-64` where they differ; empty without adapters."""
        if not self.ranks:
            return ""
        least, most = min(self.ranks), max(self.ranks)
        return str(least) if least == most else f"{least}-{most}"


def make_adapters(root: Path, base_model: Path, count: int, rank: int) -> AdapterSet:
    """Write synthetic adapters on all linears."""
    names = [f"synthetic-{number:03}" for number in range(count)]
    config = AutoConfig.from_pretrained(base_model)
    for seed, name in enumerate(tqdm(names, desc="adapters", disable=None, leave=False)):
        make_adapter(root / name, config, rank=rank, seed=seed)
    return AdapterSet(root=root, names=names, ranks=[rank] * count)


def find_adapters(root: Path, count: int) -> AdapterSet:
    """Take the first `count` adapters of a directory, by name.

    Raises:
        ValueError: it holds fewer.
    """
    configs = sorted(root.glob("*/adapter_config.json"))
    if len(configs) < count:
        raise ValueError(f"{root} holds {len(configs)} adapters; {count} are asked for")
    ranks = [int(json.loads(path.read_text(encoding="utf-8"))["r"]) for path in configs[:count]]
    return AdapterSet(root=root, names=[path.parent.name for path in configs[:count]], ranks=ranks)
