"""Adapters that cannot be served fail the requests that name them, and nothing else."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora.serve.background import RunningServer
from manylora_client import Client, InvalidArgument, ManyloraClientError
from safetensors.torch import save_file

from bench.campaigns.harness import DONE_S, PROMPTS, SYNTHETIC, TRAINED, at_once, connect, wait_idle

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
}
CONFIG |= {"layers_to_transform": [0], "bias": "none"}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


def tensors(rank: int = 4, width: int = 576, module: str = MODULE) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, width, generator=draw),
        f"{module}.lora_B.weight": torch.randn(width, rank, generator=draw),
    }


def write(
    directory: Path, config: dict[str, Any] = CONFIG, weights: dict[str, torch.Tensor] | None = None
) -> None:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors() if weights is None else weights, directory / WEIGHTS)


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: write(directory, {**CONFIG, **changes})


def with_weights(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: write(directory, weights=tensors(**changes))


def with_extra(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda directory: write(directory, weights={**tensors(), name: tensor})


def with_rank_128(directory: Path) -> None:
    write(directory, {**CONFIG, "r": 128}, tensors(rank=128))


def with_half_a_pair(directory: Path) -> None:
    write(directory, weights={k: v for k, v in tensors().items() if "lora_A" in k})


def with_nan(directory: Path) -> None:
    write(directory, weights={k: v * torch.nan for k, v in tensors().items()})


def with_file(content: Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        write(directory)
        path = directory / name
        path.write_bytes(content(path.read_bytes()))

    return make


def with_pickle(directory: Path) -> None:
    write(directory)
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(tensors()))


def without(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        write(directory)
        (directory / name).unlink()

    return make


def as_link(directory: Path) -> None:
    outside = directory.parent.parent / f"outside-{directory.name}"
    write(outside)
    directory.symlink_to(outside)


def with_linked_weights(directory: Path) -> None:
    outside = directory.parent.parent / f"outside-{directory.name}"
    write(outside)
    write(directory)
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(outside / WEIGHTS)


def nothing(directory: Path) -> None:
    """For names that are wrong by themselves."""


@dataclass(frozen=True)
class Bad:
    make: Callable[[Path], None]
    code: str
    words: tuple[str, ...] = field(default=())


BAD = {
    "dora": Bad(with_config(use_dora=True), "UNSUPPORTED", ("use_dora",)),
    "bias": Bad(with_config(bias="all"), "UNSUPPORTED", ("bias",)),
    "saved-modules": Bad(with_config(modules_to_save=["lm_head"]), "UNSUPPORTED", ("modules_to_save",)),
    "new-key": Bad(with_config(use_tomorrow=True), "UNSUPPORTED", ("use_tomorrow",)),
    "other-kind": Bad(with_config(peft_type="IA3"), "UNSUPPORTED", ("IA3",)),
    "two-reasons": Bad(with_config(use_dora=True, bias="all"), "UNSUPPORTED", ("use_dora", "bias")),
    "magnitudes": Bad(
        with_extra(f"{MODULE}.lora_magnitude_vector.weight", torch.zeros(576)), "UNSUPPORTED", ("DoRA",)
    ),
    "lm-head": Bad(with_extra("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 576)), "UNSUPPORTED"),
    "high-rank": Bad(with_rank_128, "INVALID_ARG", ("128", "max_lora_rank")),
    "other-rank": Bad(with_weights(rank=8), "INVALID_ARG", ("rank",)),
    "other-model": Bad(with_weights(width=2048), "INVALID_ARG", ("2048", "576")),
    "no-such-module": Bad(
        with_weights(module="base_model.model.model.layers.99.self_attn.q_proj"), "INVALID_ARG"
    ),
    "half-a-pair": Bad(with_half_a_pair, "INVALID_ARG", ("lora_B",)),
    "nan": Bad(with_nan, "INVALID_ARG", ("NaN",)),
    "empty-file": Bad(with_file(lambda old: b""), "INVALID_ARG"),
    "truncated": Bad(with_file(lambda old: old[:-100]), "INVALID_ARG"),
    "longer": Bad(with_file(lambda old: old + b"more"), "INVALID_ARG"),
    "garbage": Bad(with_file(lambda old: bytes(range(256)) * 8), "INVALID_ARG"),
    "endless-header": Bad(with_file(lambda old: struct.pack("<Q", 2**63) + old[8:]), "INVALID_ARG"),
    "no-json": Bad(with_file(lambda old: b"{", "adapter_config.json"), "INVALID_ARG"),
    "no-object": Bad(with_file(lambda old: b"[]", "adapter_config.json"), "INVALID_ARG"),
    "pickle": Bad(with_pickle, "", ("safetensors",)),
    "no-weights": Bad(without(WEIGHTS), ""),
    "no-config": Bad(without("adapter_config.json"), ""),
    "empty-directory": Bad(Path.mkdir, ""),
    "file": Bad(Path.touch, "NOT_FOUND"),
    "link-out": Bad(as_link, "INVALID_ARG"),
    "weights-link-out": Bad(with_linked_weights, "INVALID_ARG"),
    "loop": Bad(lambda directory: directory.symlink_to(directory), "NOT_FOUND"),
    "nobody": Bad(nothing, "NOT_FOUND", ("nobody",)),
    "../adapters": Bad(nothing, "INVALID_ARG"),
    "..": Bad(nothing, "INVALID_ARG"),
    ".hidden": Bad(nothing, "INVALID_ARG"),
    f"{SYNTHETIC[0]}/": Bad(nothing, "INVALID_ARG"),
    "/etc": Bad(nothing, "INVALID_ARG"),
    "a" * 129: Bad(nothing, "INVALID_ARG"),
    "naïve": Bad(nothing, "INVALID_ARG"),
    "new\nline": Bad(nothing, "INVALID_ARG"),
}
GOOD = ["", *SYNTHETIC[:3]]


@pytest.fixture(scope="module")
def bad_root(adapter_root: Path) -> Iterator[Path]:
    for name, bad in BAD.items():
        bad.make(adapter_root / name)
    yield adapter_root
    for name, bad in BAD.items():
        path = adapter_root / name
        if bad.make is nothing:
            continue
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)
    for outside in adapter_root.parent.glob("outside-*"):
        shutil.rmtree(outside)


def ask(client: Client, name: str) -> str | ManyloraClientError:
    try:
        return client.generate(PROMPTS[0], adapter_id=name, max_tokens=4).text
    except ManyloraClientError as error:
        return error


def check(name: str, answer: str | ManyloraClientError) -> None:
    bad = BAD[name]
    assert isinstance(answer, ManyloraClientError), f"{name} was served: {answer}"
    allowed = [bad.code] if bad.code else ["INVALID_ARG", "NOT_FOUND", "UNSUPPORTED"]
    assert answer.code in allowed, answer
    for word in bad.words:
        assert word in answer.message
    others = {*BAD, *SYNTHETIC, *TRAINED} - {name}
    words = {word.strip("'\",:;.()") for word in answer.message.split()}
    assert not {other for other in others if "-" in other} & words, "names another adapter"


def test_a_good_adapter_of_the_same_make_is_served(server: RunningServer, adapter_root: Path):
    write(adapter_root / "good-make")
    with connect(server) as client:
        assert isinstance(ask(client, "good-make"), str)


def test_refused_adapters_disturb_no_other_request(server: RunningServer, bad_root: Path):
    with connect(server, "grpc") as client:
        alone = {name: ask(client, name) for name in GOOD}
        names = [name for pair in zip(BAD, GOOD * len(BAD), strict=False) for name in pair]
        answers = at_once(lambda name: ask(client, name), names)
        for name, answer in zip(names, answers, strict=True):
            if name in BAD:
                check(name, answer)
            else:
                assert answer == alone[name]
        assert {name: ask(client, name) for name in GOOD} == alone
    status = wait_idle(server)
    assert status.check_errors == []
    assert status.gauges["kv_blocks_free"] == status.gauges["kv_blocks_total"]


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_refusal_is_the_same_on_a_stream(server: RunningServer, bad_root: Path, name: str):
    with connect(server) as client:
        with pytest.raises(ManyloraClientError) as caught:
            client.stream(PROMPTS[0], adapter_id=name, max_tokens=4).collect()
        check(name, caught.value)


def test_a_repaired_adapter_is_served_after_a_pause(server: RunningServer, adapter_root: Path):
    directory = adapter_root / "in-repair"
    with_nan(directory)
    with connect(server) as client:
        with pytest.raises(InvalidArgument, match="NaN"):
            client.generate(PROMPTS[0], adapter_id="in-repair", max_tokens=2)
        save_file(tensors(), directory / WEIGHTS)
        deadline = time.monotonic() + DONE_S
        while isinstance(answer := ask(client, "in-repair"), ManyloraClientError):
            assert "NaN" in answer.message
            assert time.monotonic() < deadline
        assert client.generate(PROMPTS[0], adapter_id="in-repair", max_tokens=2).adapter_version
