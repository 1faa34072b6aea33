"""Hostile values for an adapter's config, its tensors' names and the numbers of its header."""

from __future__ import annotations

from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 4, 8, 32, -1, -4, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**19, 10**30,
    1.0, 4.5,
    "4", None, True, [4], {},
)  # fmt: skip

DTYPES: tuple[Any, ...] = (
    "F16", "BF16", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4",
    "C64", "f32",
    "F32 ", "float32", "", "F128", "U64", None, 32, ["F32"], "F" * 10_000,
)  # fmt: skip

NAMES: tuple[tuple[str, str], ...] = (
    (r"^base_model\.model\.", ""), (r"^base_model\.", ""), (r"^", "base_model.model."), (r"\.weight$", ""),
    (r"\.weight$", ".default.weight"), (r"\.weight$", ".bias"), (r"\.weight$", ".weight.weight"), (r"lora_A",
    "lora_B"),
    (r"lora_([AB])", r"lora_embedding_\1"), (r"lora_[AB]", "lora_magnitude_vector"), (r"lora_", "LORA_"),
    (r"lora_", "lora_C"), (r"lora_([AB])", r"lora_\1.other"), (r"layers\.\d+", "layers.99"),
    (r"layers\.(\d+)", r"layers.0\1"),
    (r"layers\.\d+", "layers.-1"), (r"layers\.\d+", "layers.1.layers.1"), (r"q_proj", "k_proj"), (r"q_proj",
    "q_prоj"),
    (r"self_attn", "mlp"), (r"q_proj", "lm_head"), (r"model\.layers.*proj", "lm_head"),
    (r"model\.layers.*proj", ""),
    (r"model\.layers.*proj", "model.embed_tokens"), (r"\.lora_", ".base_layer.lora_"), (r"^.*$", "x"),
    (r"^.*$", "__x__"),
    (r"^.*$", "\U0001f600"), (r"^.*$", "n" * 20_000), (r"\.", ".."), (r"\.", "/"), (r"$", " "), (r"$", "\n"),
    (r"$", "\u0000"),
    (r"\.lora_", ".modules_to_save.lora_"), (r"_proj", "_proj.0"),
)  # fmt: skip
"""Regex and replacement, applied once to a tensor's name."""

_ANY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**19,
    1e308,
    "",
    "x",
    [],
    [None],
    {},
    {"a": 1},
    [[1]],
    "\ud800",
)
_NAMES: tuple[Any, ...] = (
    "q_proj", "all-linear", "ALL-LINEAR", ".*", ".*q_proj", "(", "(a+)+$", "(x+x+)+y", r"(?P<idx>\d+)", "[",
    "*",
    "(?i)Q_PROJ", "a{99999}", "(?:" * 200 + ")" * 200, "." * 5000, r"\1", "(?<=a+)b", [""], ["q_proj",
    "q_proj"], ["q"],
    ["q_proj", "o_proj"], ["o_proj", "q_proj"], ["q_proj"], ["q_proj", "o_proj", "k_proj"], ["lm_head"],
    ["embed_tokens"],
    ["proj"], ["q_proj", "o_proj", "nothing"], ["q_proj\n", "o_proj"], ["n" * 100_000], ["q_proj"] * 10_000,
    [1],
)  # fmt: skip

CONFIG_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": (*_ANY, "lora", "LORA ", "IA3", "LOHA", "PREFIX_TUNING"),
    "task_type": (*_ANY, "SEQ_CLS", "causal_lm", "FEATURE_EXTRACTION"),
    "r": (*_ANY, 1, 3, 5, 64, 65, 2**31, 2**63, "4", 4.0, [4]),
    "lora_alpha": (*_ANY, 1, 8, 16, 0.5, -3, 1e-300, 1e300, 1e38, 1e39, "8", 2**63),
    "target_modules": (*_ANY, *_NAMES),
    "exclude_modules": (*_ANY, *_NAMES),
    "rank_pattern": (
        *_ANY, {"q_proj": 4}, {"q_proj": 8}, {"q_proj": 0}, {"q_proj": -4}, {"q_proj": 4.0}, {"q_proj": "4"},
        {"": 4},
        {"(": 4}, {"(a+)+$": 4}, {".*": 4}, {"nothing": 9}, {f"k{i}": 4 for i in range(2000)},
        {"q_proj|o_proj": 4},
        {"^model": 4}, {"*": 4}, {"q_proj": 10**19}, {"x" * 100_000: 4},
    ),
    "alpha_pattern": (
        *_ANY, {"q_proj": 2}, {"q_proj": 0}, {"q_proj": -2.5}, {"q_proj": 1e300}, {"o_proj": 1e-300},
        {"(": 2},
        {".*": 0}, {"q_proj": "2"}, {"(.*)*$": 3}, {"q_proj": 0, "o_proj": 3},
    ),
    "layers_to_transform": (*_ANY, 1, [0], [0, 1, 2], [2, 2], [99], [-1], [10**18], ["0"],
    list(range(10_000))),
    "layers_pattern": (*_ANY, "layers", ["layers"], ["h"], "(", ["(a+)+"], r"(?P<idx>x)", ["layers",
    "model"]),
    "use_rslora": (*_ANY, "true"),
    "use_dora": (*_ANY,),
    "bias": (*_ANY, "none", "all", "lora_only"),
    "fan_in_fan_out": (*_ANY,),
    "lora_bias": (*_ANY,),
    "modules_to_save": (*_ANY, ["lm_head"]),
    "init_lora_weights": (*_ANY, "gaussian", "pissa", "PISSA_niter_4", "eva", "olora", "loftq", "orthogonal",
    "g" * 10_000),
    "base_model_name_or_path": (*_ANY, "/etc/passwd", "x" * 100_000, "../..", "http://x.invalid/"),
    "revision": (*_ANY, "main"),
    "auto_mapping": (*_ANY, {"base_model_class": "X", "parent_library": "os"}),
    "runtime_config": (*_ANY,),
    "trainable_token_indices": (*_ANY,),
    "layer_replication": (*_ANY, [[0, 2]]),
    "lora_dropout": (*_ANY, 0.9),
    "\ud800": (1, None),
    "x" * 100_000: (1, None, False),
    "a key of tomorrow": _ANY,
}  # fmt: skip
