"""A load fails closed: what is not understood or does not fit is refused, with every reason."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora.adapters import patterns, peft_format
from manylora.adapters.peft_format import read_adapter
from manylora.errors import (
    InvalidArgumentError,
    ManyloraError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from manylora.model.spec import ModelSpec
from safetensors.torch import save

from .conftest import Write, make_tensors

Q = "base_model.model.model.layers.0.self_attn.q_proj"
Q_PATH = "model.layers.0.self_attn.q_proj"
Q_PATHS = ", ".join(f"'model.layers.{i}.self_attn.q_proj'" for i in range(3))
O_PATHS = ", ".join(f"'model.layers.{i}.self_attn.o_proj'" for i in range(3))
FIRST_FIVE = f"{Q_PATHS}, 'model.layers.0.self_attn.o_proj', 'model.layers.1.self_attn.o_proj' and 1 more"


def refuse(
    directory: Path, spec: ModelSpec, *, dtype: torch.dtype = torch.float32, rank: int = 64, **options: Any
) -> ManyloraError:
    with pytest.raises(ManyloraError) as refused:
        read_adapter(directory, spec, max_lora_rank=rank, dtype=dtype, pin=False, **options)
    return refused.value


def test_a_sound_adapter_is_read(write: Write, llama_spec: ModelSpec) -> None:
    weights, report = read_adapter(
        write(), llama_spec, max_lora_rank=4, dtype=torch.bfloat16, pin=False, root=write().parent
    )
    assert weights.scale == 2.0
    assert weights.max_rank == 4
    assert [kind is not None for kind in weights.kinds] == [True, True, False, False]
    assert report.num_pages == (1, 1, 0, 0)
    assert report.num_bytes == weights.num_bytes
    assert report.unmatched == ()
    assert {module.dtype for module in report.modules} == {"F32"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_dora": True}, UnsupportedError, "use_dora=True: DoRA is not served"),
        ({"lora_bias": True}, UnsupportedError, "lora_bias=True: bias in LoRA is not served"),
        ({"bias": "all"}, UnsupportedError, "bias='all': trained biases are not served, only 'none'"),
        (
            {"modules_to_save": ["lm_head"]},
            UnsupportedError,
            "modules_to_save=['lm_head']: full training of modules is not served",
        ),
        (
            {"layer_replication": [[0, 2], [1, 3]]},
            UnsupportedError,
            "layer_replication=[[0, 2], [1, 3]]: layer replication is not served",
        ),
        (
            {"alora_invocation_tokens": [1]},
            UnsupportedError,
            "alora_invocation_tokens=[1]: activated LoRA is not served",
        ),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            UnsupportedError,
            "target_parameters=['mlp.experts.gate_up_proj']: LoRA on parameters is not served",
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [1]}},
            UnsupportedError,
            "trainable_token_indices={'embed_tokens': [1]}: training of single tokens is not served",
        ),
        ({"use_qalora": True}, UnsupportedError, "use_qalora=True: QALoRA is not served"),
        ({"arrow_config": {}}, UnsupportedError, "arrow_config={}: Arrow is not served"),
        ({"kasa_config": {}}, UnsupportedError, "kasa_config={}: KaSA is not served"),
        (
            {"megatron_config": {}},
            UnsupportedError,
            "megatron_config={}: LoRA on Megatron layers is not served",
        ),
        ({"monteclora_config": {}}, UnsupportedError, "monteclora_config={}: MonteCLoRA is not served"),
        ({"use_bdlora": {}}, UnsupportedError, "use_bdlora={}: block-diagonal LoRA is not served"),
        ({"velora_config": {}}, UnsupportedError, "velora_config={}: VeLoRA is not served"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            UnsupportedError,
            "init_lora_weights='pissa_niter_4': this initialisation changed the base weights; "
            "where PEFT can convert the adapter, save it with path_initial_model_for_weight_conversion",
        ),
        (
            {"init_lora_weights": "novel"},
            UnsupportedError,
            "init_lora_weights='novel' is not known; served are true, false, eva, gaussian, mica, orthogonal",
        ),
        ({"peft_type": "IA3"}, UnsupportedError, "peft_type='IA3': only 'LORA' is served"),
        (
            {"task_type": "SEQ_CLS"},
            UnsupportedError,
            "task_type='SEQ_CLS': only 'CAUSAL_LM' and null are served",
        ),
        ({"use_newest_idea": 1}, UnsupportedError, "'use_newest_idea'=1: the key is not known"),
        ({"r": ...}, InvalidArgumentError, "adapter_config.json lacks: 'r'"),
        (
            {"r": ..., "lora_alpha": None, "peft_type": ..., "target_modules": ...},
            InvalidArgumentError,
            "adapter_config.json lacks: 'peft_type', 'r', 'lora_alpha', 'target_modules'",
        ),
        ({"r": 0}, InvalidArgumentError, "r=0: expected a positive integer"),
        ({"r": True}, InvalidArgumentError, "r=True: expected a positive integer"),
        ({"r": 4.0}, InvalidArgumentError, "r=4.0: expected a positive integer"),
        ({"lora_alpha": "16"}, InvalidArgumentError, "lora_alpha='16': expected a finite number"),
        ({"use_rslora": 1}, InvalidArgumentError, "use_rslora=1: expected true or false"),
        (
            {"target_modules": [1]},
            InvalidArgumentError,
            "target_modules=[1]: expected a regular expression or a list of names",
        ),
        (
            {"rank_pattern": {"q_proj": 1.5}},
            InvalidArgumentError,
            "rank_pattern={'q_proj': 1.5}: expected names with positive integers",
        ),
        (
            {"alpha_pattern": {"q_proj": "1"}},
            InvalidArgumentError,
            "alpha_pattern={'q_proj': '1'}: expected names with finite numbers",
        ),
        (
            {"layers_to_transform": "all"},
            InvalidArgumentError,
            "layers_to_transform='all': expected a layer or a list of layers",
        ),
        (
            {"target_modules": r".*\.(q|o)_proj", "layers_to_transform": [0]},
            InvalidArgumentError,
            "layers_to_transform cannot be given when target_modules is text instead of a list",
        ),
        (
            {"layers_pattern": "layers"},
            InvalidArgumentError,
            "layers_pattern is given without layers_to_transform",
        ),
        (
            {"target_modules": "(q_proj"},
            InvalidArgumentError,
            "target_modules has '(q_proj', which is no regular expression: "
            "missing ), unterminated subpattern at position 0",
        ),
        (
            {"lora_alpha": 0},
            InvalidArgumentError,
            "nothing to apply: lora_alpha is 0 for every linear",
        ),
        (
            {"r": 8},
            InvalidArgumentError,
            f"rank 4 in the file is unlike the config's 8: {FIRST_FIVE}",
        ),
        (
            {"target_modules": ["o_proj"]},
            InvalidArgumentError,
            f"the file has tensors for linears that the config does not target: {Q_PATHS}",
        ),
        (
            {"target_modules": ["q_proj", "o_proj", "v_proj"], "layers_to_transform": [0, 1, 2]},
            InvalidArgumentError,
            "the config targets linears that have no tensors in the file: "
            + Q_PATHS.replace("q_proj", "v_proj"),
        ),
        (
            {"target_modules": ["q_proj", "o_proj", "lm_head", "embed_tokens"]},
            UnsupportedError,
            "target_modules names modules on which no LoRA is served: 'lm_head', 'model.embed_tokens'",
        ),
        (
            {"use_dora": True, "bias": "all", "r": 8, "later": []},
            UnsupportedError,
            "use_dora=True: DoRA is not served; 'later'=[]: the key is not known; "
            "bias='all': trained biases are not served, only 'none'; "
            f"rank 4 in the file is unlike the config's 8: {FIRST_FIVE}",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_config_is_refused(
    write: Write,
    llama_spec: ModelSpec,
    changes: dict[str, Any],
    error: type[ManyloraError],
    message: str,
) -> None:
    refused = refuse(write(**changes), llama_spec)
    assert refused.message == message
    assert type(refused) is error


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.5, "fan_in_fan_out": True, "inference_mode": True, "peft_version": "9.9"},
        {"modules_to_save": [], "layer_replication": None, "use_dora": False, "target_parameters": []},
        {"enable_lora": None, "merge_weights": False, "bias": ...},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"loftq_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16, "task_type": None},
        {"lora_alpha": 8.5, "rank_pattern": None, "layers_to_transform": []},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_keys_without_effect_are_accepted(
    write: Write, llama_spec: ModelSpec, changes: dict[str, Any]
) -> None:
    read_adapter(write(**changes), llama_spec, max_lora_rank=64, dtype=torch.float32, pin=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {f"{Q}.lora_B.weight": None},
            InvalidArgumentError,
            f"half a pair: the file has no lora_B: '{Q_PATH}'",
        ),
        (
            {f"{Q}.lora_A.weight": None},
            InvalidArgumentError,
            f"half a pair: the file has no lora_A: '{Q_PATH}'",
        ),
        (
            {f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None},
            InvalidArgumentError,
            f"the config targets linears that have no tensors in the file: '{Q_PATH}'",
        ),
        (
            {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)},
            InvalidArgumentError,
            "the file has LoRA for modules that the base model does not have: "
            "'model.layers.9.self_attn.q_proj'",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(4, 64), f"{Q}.lora_B.weight": torch.zeros(64, 4)},
            InvalidArgumentError,
            f"A [4, 64] and B [64, 4] do not fit the base model's linear [32, 32]: '{Q_PATH}'",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(4, 32, 1)},
            InvalidArgumentError,
            f"A [4, 32, 1] and B [32, 4] do not fit the base model's linear [32, 32]: '{Q_PATH}'",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(5, 32)},
            InvalidArgumentError,
            f"rank 5 in A and 4 in B in the file is unlike the config's 4: '{Q_PATH}'",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(0, 32), f"{Q}.lora_B.weight": torch.zeros(32, 0)},
            InvalidArgumentError,
            f"rank 0 in the file is unlike the config's 4: '{Q_PATH}'",
        ),
        (
            {f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)},
            InvalidArgumentError,
            f"tensors hold NaN or infinity: '{Q}.lora_A.weight'",
        ),
        (
            {f"{Q}.lora_B.weight": torch.full((32, 4), -torch.inf)},
            InvalidArgumentError,
            f"tensors hold NaN or infinity: '{Q}.lora_B.weight'",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int64)},
            InvalidArgumentError,
            f"tensors have dtype I64, expected one of F16, BF16, F32, F64: '{Q}.lora_A.weight'",
        ),
        (
            {f"{Q}.lora_A.default.weight": torch.zeros(4, 32)},
            InvalidArgumentError,
            f"the file has two A for one linear: '{Q_PATH}'; "
            "the file has tensors of several adapters: 'None, default'",
        ),
        (
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)},
            InvalidArgumentError,
            "tensors bind to no module (expected base_model.model.<module>.lora_A.weight or lora_B): "
            "'model.layers.0.self_attn.q_proj.lora_A.weight'",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)},
            UnsupportedError,
            "the file has tensors of embedding LoRA, which is not served: "
            "'base_model.model.model.embed_tokens.lora_embedding_A'",
        ),
        (
            {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)},
            UnsupportedError,
            "the file has LoRA for modules on which none is served: 'lm_head'",
        ),
        (
            {"base_model.model.lm_head.weight": torch.zeros(70, 32)},
            UnsupportedError,
            "the file has weights of the base model, which are not served: 'base_model.model.lm_head.weight'",
        ),
        (
            {f"{Q}.lora_magnitude_vector.weight": torch.zeros(32)},
            UnsupportedError,
            f"the file has tensors of DoRA, which is not served: '{Q}.lora_magnitude_vector.weight'",
        ),
        (
            {f"{Q}.lora_B.bias": torch.zeros(32)},
            UnsupportedError,
            f"the file has biases of LoRA, which are not served: '{Q}.lora_B.bias'",
        ),
        (
            {f"{Q}.lora_diag": torch.zeros(4)},
            UnsupportedError,
            f"the file has tensors of a kind of LoRA that is not served: '{Q}.lora_diag'",
        ),
        (
            {f"{Q}.base_layer.bias": torch.zeros(32)},
            UnsupportedError,
            f"the file has weights of the base model, which are not served: '{Q}.base_layer.bias'",
        ),
    ],
)
def test_a_tensor_is_refused(
    write: Write,
    llama_spec: ModelSpec,
    changes: dict[str, torch.Tensor | None],
    error: type[ManyloraError],
    message: str,
) -> None:
    tensors = {**make_tensors(llama_spec), **changes}
    written = write({name: tensor for name, tensor in tensors.items() if tensor is not None})
    refused = refuse(written, llama_spec)
    assert refused.message == message
    assert type(refused) is error


def test_an_adapter_of_another_base_model_is_refused(write: Write, llama_spec: ModelSpec) -> None:
    tensors = {
        name: torch.zeros([2 * size if size == 32 else size for size in tensor.shape])
        for name, tensor in make_tensors(llama_spec).items()
    }
    assert refuse(write(tensors), llama_spec).message == (
        f"A [4, 64] and B [64, 4] do not fit the base model's linear [32, 32]: {FIRST_FIVE}"
    )


def test_an_adapter_that_matches_nothing_is_refused(write: Write, llama_spec: ModelSpec) -> None:
    message = refuse(write({}, target_modules=["query_key_value"]), llama_spec).message
    assert message == "nothing to apply: the config targets no linear of the base model"


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        (
            {"use_dora": True, "target_modules": "("},
            None,
            "use_dora=True: DoRA is not served; target_modules has '(', which is no regular expression: "
            "missing ), unterminated subpattern at position 0",
        ),
        (
            {"bias": "all", "r": 2},
            b"",
            "bias='all': trained biases are not served, only 'none'; "
            "the safetensors file has 0 bytes; even an empty one has 10",
        ),
    ],
    ids=["pattern", "container"],
)
def test_reasons_of_all_stages_stand_in_one_message(
    write: Write, llama_spec: ModelSpec, changes: dict[str, Any], data: bytes | None, message: str
) -> None:
    refused = refuse(write(data, **changes), llama_spec)
    assert refused.message == message
    assert type(refused) is UnsupportedError


def test_rank_over_the_limit_is_refused(write: Write, llama_spec: ModelSpec) -> None:
    assert refuse(write(), llama_spec, rank=3).message == f"rank 4 is over max_lora_rank=3: {FIRST_FIVE}"


@pytest.mark.parametrize(
    ("value", "dtype", "name"),
    [(7e4, torch.float16, "float16"), (1e300, torch.float32, "float32"), (1e300, torch.bfloat16, "bfloat16")],
    ids=["float16", "float32", "bfloat16"],
)
def test_a_value_over_the_pools_range_is_refused(
    write: Write, llama_spec: ModelSpec, value: float, dtype: torch.dtype, name: str
) -> None:
    tensors = make_tensors(llama_spec)
    tensors[f"{Q}.lora_A.weight"] = torch.full((4, 32), value, dtype=torch.float64)
    refused = refuse(write(tensors), llama_spec, dtype=dtype)
    assert refused.message == f"tensors hold values too large for lora_dtype={name}: '{Q}.lora_A.weight'"


@pytest.mark.parametrize("alpha", [1e9, 1e39], ids=["over float16", "near float32's end"])
def test_a_folded_scaling_over_the_pools_range_is_refused(
    write: Write, llama_spec: ModelSpec, alpha: float
) -> None:
    refused = refuse(write(alpha_pattern={"o_proj": alpha}), llama_spec, dtype=torch.float16)
    names = O_PATHS.replace("'model", "'base_model.model.model").replace("o_proj'", "o_proj.lora_B.weight'")
    assert refused.message == f"tensors hold values too large for lora_dtype=float16: {names}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 1e300}, "the scaling is beyond what float32 holds"),
        ({"alpha_pattern": {"o_proj": -1e300}}, "the scaling is beyond what float32 holds"),
        ({"alpha_pattern": {"q_proj": 1e39, "o_proj": 1e-20}}, "the scaling is too far below"),
    ],
    ids=["of all", "of some", "lost beside another"],
)
def test_a_scaling_that_would_be_lost_is_refused(
    write: Write, llama_spec: ModelSpec, settings: dict[str, Any], message: str
) -> None:
    assert message in refuse(write(**settings), llama_spec).message


def test_a_module_with_scaling_zero_leaves_the_others(write: Write, llama_spec: ModelSpec) -> None:
    directory = write(alpha_pattern={r"layers\.0\.self_attn\.q_proj": 0})
    weights, report = read_adapter(directory, llama_spec, max_lora_rank=4, dtype=torch.float32, pin=False)
    assert weights.scale == 2.0
    assert [module.path for module in report.modules if module.is_zero] == [Q_PATH]


def test_names_that_match_nothing_are_reported(write: Write, llama_spec: ModelSpec) -> None:
    directory = write(target_modules=["q_proj", "o_proj", "wi"], rank_pattern={"wo": 8, "v_proj": 9})
    _, report = read_adapter(directory, llama_spec, max_lora_rank=4, dtype=torch.float32, pin=False)
    assert report.unmatched == ("wi", "wo", "v_proj")


def test_tensors_with_an_adapter_name_are_read(write: Write, llama_spec: ModelSpec) -> None:
    plain = make_tensors(llama_spec)
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in plain.items()}
    read = [
        read_adapter(write(t, name=n), llama_spec, max_lora_rank=4, dtype=torch.float32, pin=False)[0]
        for n, t in (("plain", plain), ("named", named))
    ]
    for one, other in zip(read[0].kinds, read[1].kinds, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert all(torch.equal(one.parts[name], other.parts[name]) for name in ("a", "b"))


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> bytes:
    fields = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}
    return json.dumps({"t": {key: value for key, value in fields.items() if value is not None}}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the safetensors file has 0 bytes; even an empty one has 10"),
        (b"\0" * 7, "the safetensors file has 7 bytes; even an empty one has 10"),
        (header(b""), "the safetensors header does not begin with '{'"),
        (header(b" {}"), "the safetensors header does not begin with '{'"),
        (
            struct.pack("<Q", 1 << 63) + b"{}",
            "the safetensors header claims 9223372036854775808 bytes; at most 4194304 are read",
        ),
        (
            struct.pack("<Q", 100) + b"{}",
            "the safetensors header claims 100 bytes, but only 2 follow",
        ),
        (header(b"{"), "the safetensors header is not JSON: "),
        (header(b"{}\xff"), "the safetensors header is not UTF-8 at byte 2"),
        (
            header(b'{"a":{},"a":{}}'),
            "the safetensors header is refused: the key 'a' stands twice in one object",
        ),
        (
            header(b'{"t":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"0123"),
            "the safetensors header is refused: the key 'dtype' stands twice in one object",
        ),
        (
            header(b'{"__metadata__":{"format":1}}'),
            "__metadata__ in the safetensors header must map text to text",
        ),
        (
            header(entry(shape=None), b"0123"),
            "the safetensors header's entry 't' must have dtype, shape and data_offsets and nothing else",
        ),
        (
            header(entry(dtype="F33"), b"0123"),
            "the safetensors header's entry 't' has dtype 'F33'; known are ",
        ),
        (
            header(entry(shape=[-1]), b"0123"),
            "the safetensors header's entry 't' has shape [-1]; expected up to 8 sizes",
        ),
        (
            header(entry(shape=[True]), b"0123"),
            "the safetensors header's entry 't' has shape [True]; expected up to 8 sizes",
        ),
        (
            header(entry(shape=[1] * 9), b"0123"),
            "the safetensors header's entry 't' has shape [1, 1, 1, 1, 1, 1, 1, 1, 1]; expected up to 8",
        ),
        (
            header(entry(data_offsets=[4, 0]), b"0123"),
            "the safetensors header's entry 't' has data_offsets [4, 0]; expected [begin, end]",
        ),
        (
            header(entry(shape=[2]), b"0123"),
            "the safetensors header's entry 't' spans 4 bytes, but F32 [2] takes 8",
        ),
        (
            header(entry(shape=[1 << 31, 1 << 31, 4]), b"0123"),
            "the safetensors header's entry 't' spans 4 bytes, but F32 ",
        ),
        (
            header(entry(data_offsets=[4, 8]), b"01230123"),
            "tensor 't' begins at byte 4, not 0: it leaves a gap before it",
        ),
        (
            header(b'{"a":' + entry()[6:-1] + b',"b":' + entry()[6:-1] + b"}", b"0123"),
            "tensor 'b' begins at byte 0, not 4: it overlaps the tensor before it",
        ),
        (
            header(entry(), b"012"),
            "the file is truncated: its tensors take 4 bytes, but 3 follow the header",
        ),
        (
            header(entry(), b"01234"),
            "the file is over-long: its tensors take 4 bytes, but 5 follow the header",
        ),
    ],
)
def test_a_broken_container_is_refused(
    write: Write, llama_spec: ModelSpec, data: bytes, message: str
) -> None:
    refused = refuse(write(data), llama_spec)
    assert refused.message.startswith(message)
    assert type(refused) is InvalidArgumentError


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "adapter_config.json is not JSON: Expecting value at character 0"),
        (b"[]", "adapter_config.json holds a JSON list; expected an object"),
        (b"\xff", "adapter_config.json is not UTF-8 at byte 0"),
        (b'{"r": 1, "r": 2}', "adapter_config.json is refused: the key 'r' stands twice in one object"),
        (b'{"r": NaN}', "adapter_config.json is refused: NaN is no JSON number"),
        (b'{"r": ' + b"9" * 5000 + b"}", "adapter_config.json is refused: a number of 5000 digits"),
        (b'{"r": ' + b"[" * 100_000, "adapter_config.json is nested too deeply"),
        (b" " * (1 << 20) + b"{}", "adapter_config.json has 1048578 bytes; at most 1048576 are read"),
    ],
    ids=["empty", "list", "encoding", "duplicate", "nan", "long number", "deep", "too long"],
)
def test_a_broken_config_file_is_refused(
    write: Write, llama_spec: ModelSpec, data: bytes, message: str
) -> None:
    refused = refuse(write(config=data), llama_spec)
    assert refused.message == message
    assert type(refused) is InvalidArgumentError


def test_text_of_the_files_is_escaped_and_clipped(write: Write, llama_spec: ModelSpec) -> None:
    surrogate = b'{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], "\\ud800\\n": 1}'
    message = refuse(write(config=surrogate), llama_spec).message
    assert "'\\ud800\\n'=1: the key is not known" in message
    assert message.encode("utf-8")
    long = refuse(write(bias="x" * 10_000), llama_spec).message
    assert len(long) < 300


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_not_found(write: Write, llama_spec: ModelSpec, name: str) -> None:
    directory = write()
    (directory / name).unlink()
    refused = refuse(directory, llama_spec)
    assert refused.message == f"{name} is missing"
    assert type(refused) is NotFoundError


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_never_read(write: Write, llama_spec: ModelSpec, name: str) -> None:
    directory = write()
    (directory / "adapter_model.safetensors").rename(directory / name)
    refused = refuse(directory, llama_spec)
    assert type(refused) is InvalidArgumentError
    assert refused.message == (
        f"found {name} but no adapter_model.safetensors: only safetensors is read, never pickle"
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused(write: Write, llama_spec: ModelSpec, name: str) -> None:
    directory = write()
    (directory / name).unlink()
    os.mkfifo(directory / name)
    assert refuse(directory, llama_spec).message == f"{name} is no regular file"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_links_out_of_the_root_is_refused(
    write: Write, llama_spec: ModelSpec, tmp_path: Path, name: str
) -> None:
    inside, outside = write(name="root/inside"), write(name="outside")
    (inside / name).unlink()
    (inside / name).symlink_to(outside / name)
    root = tmp_path / "root"
    refused = refuse(inside, llama_spec, root=root)
    assert refused.message == f"{name} is a link that leaves adapter_root"
    read_adapter(inside, llama_spec, max_lora_rank=4, dtype=torch.float32, pin=False)


def test_a_link_to_itself_is_refused(write: Write, llama_spec: ModelSpec, tmp_path: Path) -> None:
    directory = write()
    (directory / "adapter_config.json").unlink()
    (directory / "adapter_config.json").symlink_to("adapter_config.json")
    for options in ({}, {"root": tmp_path}):
        refused = refuse(directory, llama_spec, **options)
        assert type(refused) is UnavailableError
        assert refused.message.startswith("adapter_config.json cannot be read: ")


def test_a_regular_expression_that_takes_for_ever_is_refused(
    write: Write, llama_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "MATCH_LIMIT_S", 0.5)
    directory = write(target_modules="((.*)*)*z", rank_pattern={"a+": 4})
    assert refuse(directory, llama_spec).message == (
        "matching the regular expressions of rank_pattern, target_modules takes over 0.5 s; simplify them"
    )


def test_too_many_patterns_are_refused(write: Write, llama_spec: ModelSpec) -> None:
    directory = write(rank_pattern={f"q{i}": 4 for i in range(4097)})
    message = refuse(directory, llama_spec).message
    assert message == "the config holds 4097 patterns; at most 4096 are read"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("num_changes", [1, 2, 100])
def test_files_that_change_while_they_are_read_are_read_again_a_few_times(
    write: Write, llama_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, name: str, num_changes: int
) -> None:
    directory = write()
    version = read_adapter(directory, llama_spec, max_lora_rank=4, dtype=torch.float32, pin=False)[1].version
    real = peft_format._read_files
    num_done = 0

    def read_and_replace(*args: Any) -> Any:
        nonlocal num_done
        read = real(*args)
        if num_done < num_changes:
            # A writer that replaces a file right behind the reader, by the same content.
            num_done += 1
            (directory / "new").write_bytes((directory / name).read_bytes())
            (directory / "new").replace(directory / name)
        return read

    monkeypatch.setattr(peft_format, "_read_files", read_and_replace)
    if num_changes < peft_format.MAX_READS:
        _, report = read_adapter(directory, llama_spec, max_lora_rank=4, dtype=torch.float32, pin=False)
        assert report.version == version
        return
    refused = refuse(directory, llama_spec)
    assert refused.message == f"{name} changed while the adapter was read"
    assert type(refused) is UnavailableError


def test_the_safetensors_librarys_own_files_are_read_alike(write: Write, llama_spec: ModelSpec) -> None:
    """Mixed dtypes, metadata and padding, as the library writes them."""
    tensors = make_tensors(llama_spec)
    for name, dtype in zip(list(tensors), (torch.float16, torch.bfloat16, torch.float64), strict=False):
        tensors[name] = tensors[name].to(dtype)
    directory = write(save(tensors, metadata={"format": "pt"}))
    weights, _ = read_adapter(directory, llama_spec, max_lora_rank=4, dtype=torch.float32, pin=False)
    for path, linear in llama_spec.linears.items():
        name = f"base_model.model.{path}.lora_A.weight"
        pages = weights.kinds[linear.kind]
        if name in tensors and pages is not None:
            assert torch.equal(pages.parts["a"][linear.row, 0, linear.slice, :4], tensors[name].float())
            assert not pages.parts["a"][linear.row, 0, linear.slice, 4:].any()
