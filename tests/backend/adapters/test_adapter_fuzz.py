"""Whatever an adapter's files hold, reading them ends with a sound adapter or a refusal."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manylora.adapters import patterns
from manylora.adapters.patterns import match_paths, path_suffix, whole_path
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.safetensors_file import TensorInfo, parse_header, tensor_of
from manylora.errors import InvalidArgumentError, UnsupportedError
from manylora.model.spec import ModelSpec
from safetensors.torch import load, save

from .conftest import CONFIG, LLAMA_SITES, make_llama, make_tensors, spec_of, write_adapter

SPEC = spec_of(make_llama(), LLAMA_SITES)
SOUND = save(make_tensors(SPEC))
HEADER_BYTES = struct.unpack("<Q", SOUND[:8])[0]
REFUSALS = (InvalidArgumentError, UnsupportedError)


def read(data: bytes, config: bytes, spec: ModelSpec = SPEC) -> None:
    """Read an adapter from its two files; it must be sound or be refused."""
    with tempfile.TemporaryDirectory() as directory:
        write_adapter(Path(directory), data, config)
        try:
            weights, report = read_adapter(
                Path(directory), spec, max_lora_rank=64, dtype=torch.float32, pin=False
            )
        except REFUSALS as error:
            # What cannot be encoded cannot be sent.
            error.message.encode("utf-8")
            return
    assert report.modules
    for kind in weights.kinds:
        assert kind is None or all(bool(torch.isfinite(part).all()) for part in kind.parts.values())


@settings(max_examples=150, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, HEADER_BYTES + 40), st.binary(max_size=4), st.integers(0, 4)),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_containers(edits: list[tuple[int, bytes, int]]) -> None:
    data = SOUND
    for position, put, cut in edits:
        data = data[:position] + put + data[position + cut :]
    read(data, json.dumps(CONFIG).encode())


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_containers(data: bytes) -> None:
    read(data, json.dumps(CONFIG).encode())
    read(struct.pack("<Q", len(data)) + data, json.dumps(CONFIG).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        *CONFIG,
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "exclude_modules",
        "init_lora_weights",
        "modules_to_save",
        "use_dora",
        "later",
    ]
)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(KEYS, JSON, min_size=1, max_size=3))
def test_mutated_configs(changes: dict[str, Any]) -> None:
    read(SOUND, json.dumps({**CONFIG, **changes}).encode("utf-8", "surrogatepass"))


@settings(max_examples=100, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 140), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=3
    )
)
def test_mutated_config_bytes(edits: list[tuple[int, bytes, int]]) -> None:
    config = json.dumps(CONFIG).encode()
    for position, put, cut in edits:
        config = config[:position] + put + config[position + cut :]
    read(SOUND, config)


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "F32", "BF16", "I8", "F8_E4M3"]),
        "shape": st.lists(st.integers(0, 3), max_size=3),
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2),
    }
)


@settings(max_examples=300, deadline=None)
@given(entries=st.dictionaries(st.sampled_from("abc"), ENTRY, max_size=3), data_bytes=st.integers(0, 24))
def test_nothing_is_accepted_that_the_library_refuses(entries: dict[str, Any], data_bytes: int) -> None:
    header = json.dumps(entries).encode()
    data = bytes(range(data_bytes))
    try:
        tensors = parse_header(header, data_bytes)
    except InvalidArgumentError:
        return
    loaded = load(struct.pack("<Q", len(header)) + header + data)
    assert set(tensors) == set(loaded)
    for name, info in tensors.items():
        assert tuple(loaded[name].shape) == info.shape


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=2), min_size=1, max_size=4),
    dtypes=st.lists(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), min_size=4, max_size=4
    ),
)
def test_what_the_library_writes_is_read_alike(shapes: list[list[int]], dtypes: list[torch.dtype]) -> None:
    written = {
        f"t{i}": torch.randn(shape).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    data = save(written)
    length = struct.unpack("<Q", data[:8])[0]
    body = bytearray(data[8 + length :])
    tensors = parse_header(data[8 : 8 + length], len(body))
    assert set(tensors) == set(written)
    for name, info in tensors.items():
        assert torch.equal(tensor_of(info, body), written[name])


def test_a_tensor_at_an_odd_byte_is_read() -> None:
    """The container does not align tensors behind one of odd length."""
    values = torch.randn(3)
    body = bytearray(b"\0" + values.numpy().tobytes())
    info = TensorInfo(name="t", dtype="F32", shape=(3,), begin=1, end=13)
    assert torch.equal(tensor_of(info, body) + 0, values)


NAME = st.text("abq_.", min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(NAME, min_size=1, max_size=5, unique=True), paths=st.lists(NAME, max_size=8, unique=True)
)
def test_plain_names_match_as_regular_expressions_do(texts: list[str], paths: list[str]) -> None:
    wanted = [form("rank_pattern", text) for text in texts for form in (path_suffix, whole_path)]
    assert all(pattern.is_plain for pattern in wanted)
    assert match_paths(wanted, paths) == patterns._match_in_child(wanted, paths)


def test_a_broken_expression_names_its_setting() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^alpha_pattern has '\*x', which is no regular expression"
    ):
        match_paths([path_suffix("rank_pattern", "a+"), path_suffix("alpha_pattern", "*x")], ["a"])
