"""A thousand seeded mutants of sound adapters: each is refused, or bound exactly as PEFT binds it."""

from __future__ import annotations

import json
import re
import resource
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora.adapters.peft_format import BindingReport, read_adapter
from manylora.adapters.weights import AdapterWeights
from manylora.errors import ManyloraError
from manylora.model.spec import LinearSpec, ModelSpec
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from bench.campaigns.hostile.mutants import Mutant, Mutations

from .conftest import CONFIG, LLAMA_SITES, make_llama, make_tensors, spec_of

SEED = 0
END_S = 300
"""Longest that one adapter may take."""
MAX_GROWTH_KIB = 512 << 10
"""Of this process' peak memory: several times what PEFT takes, far below what the mutants claim to hold."""
CODES = {"INVALID_ARG", "NOT_FOUND", "UNSUPPORTED", "UNAVAILABLE"}

SPEC = spec_of(make_llama(), LLAMA_SITES)
PATTERNED: dict[str, Any] = {
    **CONFIG,
    "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
    "alpha_pattern": {"down_proj": 3, r"layers\.[12]\..*k_proj": 5},
    "use_rslora": True,
}
DECISIVE = frozenset(
    {
        *PATTERNED,
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
    }
)
"""What of a config decides where an adapter applies and how strongly. PEFT is told no more: of the rest it
also refuses what only training reads."""
Read = tuple[AdapterWeights, BindingReport]


def patterned_tensors() -> dict[str, torch.Tensor]:
    by_rank = {rank: make_tensors(SPEC, tuple(PATTERNED["target_modules"]), rank) for rank in (2, 4, 7)}

    def rank_of(name: str) -> int:
        return 2 if "q_proj" in name else 7 if "layers.1.mlp.up_proj" in name else 4

    return {name: by_rank[rank_of(name)][name] for name in by_rank[4]}


def mutants(seed: int, count: int) -> list[Mutant]:
    """Different mutants, in turn of two adapters."""
    sources = (
        Mutations(seed, CONFIG, make_tensors(SPEC)),
        Mutations(seed, PATTERNED, patterned_tensors()),
    )
    found: dict[str, Mutant] = {}
    index = 0
    while len(found) < count:
        mutant = sources[index % 2].mutant(index)
        found.setdefault(mutant.digest, mutant)
        index += 1
    return list(found.values())


def read(directory: Path) -> Read | ManyloraError:
    try:
        return read_adapter(
            directory, SPEC, max_lora_rank=64, dtype=torch.float32, pin=False, root=directory.parent
        )
    except ManyloraError as error:
        return error


def delta_of(weights: AdapterWeights, linear: LinearSpec, spec: ModelSpec = SPEC) -> torch.Tensor:
    """scale * B A of one linear, [N, K], in float64."""
    pages = weights.kinds[linear.kind]
    if pages is None:
        return torch.zeros(linear.out_features, linear.in_features, dtype=torch.float64)
    kind = spec.kinds[linear.kind]
    first = sum(kind.out_features[: linear.slice])
    a = pages.parts["a"][linear.row, :, linear.slice].reshape(-1, linear.in_features).double()
    b = pages.parts["b"][linear.row].reshape(-1, sum(kind.out_features)).double()
    return weights.scale * (b[:, first : first + linear.out_features].T @ a)


def peft_deltas(directory: Path) -> dict[str, torch.Tensor]:
    """The same by PEFT, in float64, for the linears that it adapts."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key in DECISIVE}))
    weights = directory / "adapter_model.safetensors"
    # PEFT puts the adapter's name into the tensors' names itself, and leaves out what has one already.
    tensors = {
        re.sub(r"(lora_[AB])\.[^.]+\.weight$", r"\1.weight", k): t for k, t in load_file(weights).items()
    }
    save_file(tensors, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(make_llama(), str(directory))
    return {
        name.removeprefix("base_model.model."): module.double().get_delta_weight("default")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def check_binding(directory: Path, found: Read) -> None:
    weights, report = found
    assert report.modules
    expected = peft_deltas(directory)
    assert {module.path for module in report.modules} == set(expected)
    for path, linear in SPEC.linears.items():
        delta = delta_of(weights, linear)
        if path not in expected:
            assert not delta.any()
            continue
        # float32 holds the pages; products of two of its numbers may leave its range.
        size = float(expected[path].abs().max())
        torch.testing.assert_close(delta, expected[path], rtol=1e-5, atol=1e-6 * size + 1e-30)


@pytest.mark.parametrize("num_mutants", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutants_are_refused_or_bound_as_peft_binds_them(num_mutants: int, tmp_path: Path) -> None:
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[tuple[str, str]] = Counter()
    # A thread, so that a reader that hangs is an error of the test.
    with ThreadPoolExecutor(1) as pool:
        for number, mutant in enumerate(mutants(SEED, num_mutants)):
            directory = tmp_path / f"m{number}"
            try:
                mutant.write(directory)
                found = pool.submit(read, directory).result(END_S)
                if isinstance(found, ManyloraError):
                    assert found.code in CODES, found.tagged()
                    found.tagged().encode()
                    assert len(found.message) < 2000, found.message
                else:
                    check_binding(directory, found)
                outcome = found.code if isinstance(found, ManyloraError) else "bound"
                outcomes[mutant.kind, outcome] += 1
            except Exception as error:
                error.add_note(
                    f"mutant {number} of seed {SEED}: {mutant.kind}, {mutant.files}, {mutant.config[:500]!r}"
                )
                raise
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < MAX_GROWTH_KIB
    assert outcomes.total() == num_mutants
    # The mutations reach both sides, or they would show nothing.
    assert {outcome for _, outcome in outcomes} >= {"bound", *CODES - {"UNAVAILABLE"}}
    assert sum(count for (_, outcome), count in outcomes.items() if outcome == "bound") > num_mutants // 20


def test_a_mutant_depends_on_its_seed_and_index_alone() -> None:
    first = [mutant.digest for mutant in mutants(5, 40)]
    assert first == [mutant.digest for mutant in mutants(5, 40)]
    assert first != [mutant.digest for mutant in mutants(6, 40)]


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        pytest.param(CONFIG, make_tensors(SPEC), id="plain"),
        pytest.param(PATTERNED, patterned_tensors(), id="with patterns"),
    ],
)
def test_the_adapters_that_are_mutated_are_sound(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source = Mutations(0, config, tensors)
    sound = next(mutant for mutant in map(source.mutant, range(10_000)) if mutant.kind == "sound")
    sound.write(tmp_path / "sound")
    found = read(tmp_path / "sound")
    assert not isinstance(found, ManyloraError), found
    check_binding(tmp_path / "sound", found)
