"""Adapters with factors and addends of outputs, in one batch with plain ones and the base model.

No file has such parts: they are put into an adapter's memory as loading will, and go through host cache,
pool, scheduler and mixed steps from there. On a CPU in its own form, and in Triton's interpreter in a process
of its own, launched one by one and as graphs are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora import Engine, EngineConfig
from manylora.adapters import reader
from manylora.adapters.peft_format import read_adapter
from manylora.adapters.weights import AdapterWeights, allocate, fill_linear
from manylora.engine import runner
from manylora.errors import InvalidArgumentError
from manylora.model.spec import ModelSpec
from manylora_kernels.lora import native
from transformers import AutoModelForCausalLM, PreTrainedModel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="runs in a process with the interpreter"
)
on_cpu = pytest.mark.skipif(INTERPRETED, reason="runs in the process outside")

SCALING = 0.5
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # name: rank, and the linears that have A and B, a scale, an offset
    "everything": (20, ALL, ALL, ALL),
    "vectors_alone": (0, (), ("q_proj", "gate_proj", "o_proj"), ("k_proj", "gate_proj", "up_proj")),
    "in_other_kinds": (4, ("q_proj", "up_proj"), (), ("down_proj",)),
    "scales_beside_biases": (8, ("gate_proj", "v_proj"), ("gate_proj", "v_proj", "down_proj"), ()),
    "plain": (16, ("q_proj", "o_proj", "up_proj"), (), ()),
}
NAMES = ["", *ADAPTERS, "plain", ""]
LENGTHS = (3, 13, 7, 1, 9, 5, 8, 2)
NUM_TOKENS = 6

Tensors = Mapping[str, torch.Tensor]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linears have biases, which are not zero."""
    options = {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}
    plain = tiny_model("llama", **options)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
    directory = tmp_path_factory.mktemp("biased") / "llama"
    shutil.copytree(plain, directory)
    model.save_pretrained(directory)
    return directory


def parts_of(name: str, path: str, shape: tuple[int, int]) -> Tensors:
    """What an adapter has at one linear [N, K], as a file would have it."""
    rank, of_term, of_scale, of_offset = ADAPTERS[name]
    linear = path.rpartition(".")[2]
    generator = torch.Generator().manual_seed(sum(f"{name} {path}".encode()))

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    found = {}
    if linear in of_term:
        found |= {"a": randn(rank, shape[1]), "b": randn(shape[0], rank)}
    if linear in of_scale:
        found["scale"] = 1 + randn(shape[0])
    if linear in of_offset:
        found["offset"] = randn(shape[0])
    return found


def weights_of(name: str, spec: ModelSpec, model: PreTrainedModel, dtype: torch.dtype) -> AdapterWeights:
    """An adapter as loading makes it of its parts."""
    parts = {
        path: parts_of(name, path, (linear.out_features, linear.in_features))
        for path, linear in spec.linears.items()
    }
    by_kind = [
        [mine for path, mine in parts.items() if spec.linears[path].kind == kind]
        for kind in range(len(spec.kinds))
    ]
    ranks = [max((len(mine["a"]) for mine in kind if "a" in mine), default=0) for kind in by_kind]
    has_vectors = [any("scale" in mine or "offset" in mine for mine in kind) for kind in by_kind]
    buffer, kinds = allocate(spec.kinds, ranks, dtype, pin=False, has_vectors=has_vectors)
    for path, mine in parts.items():
        linear, bias = spec.linears[path], model.get_submodule(path).bias
        into = kinds[linear.kind]
        if into is not None:
            fill_linear(into, spec.kinds[linear.kind], linear, mine, bias.detach())
    return AdapterWeights(version=name, scale=SCALING, max_rank=max(ranks), buffer=buffer, kinds=kinds)


class Adapted(torch.nn.Module):
    """A linear with an adapter's parts, in the model's dtype, rounded once."""

    def __init__(self, linear: torch.nn.Linear, parts: Tensors) -> None:
        super().__init__()
        self.linear, self.parts = linear, parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight.float()
        y = x.float() @ weight.T
        if "a" in self.parts:
            y = y + SCALING * (x.float() @ self.parts["a"].T @ self.parts["b"].T)
        y = y * self.parts.get("scale", 1.0) + self.parts.get("offset", 0.0)
        return (y + self.linear.bias.float()).to(x.dtype)


def reference_of(base: Path, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model with one adapter, or "" for none, in a dtype; its parts are rounded to it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    for path, module in list(model.named_modules()):
        if name and isinstance(module, torch.nn.Linear) and path.startswith("model.layers."):
            parent, _, own = path.rpartition(".")
            parts = parts_of(name, path, (module.out_features, module.in_features))
            rounded = {part: tensor.to(dtype).float() for part, tensor in parts.items()}
            setattr(model.get_submodule(parent), own, Adapted(module, rounded))
    return model


@torch.inference_mode()
def wanted_of(base: Path, dtype: torch.dtype) -> list[list[int]]:
    """Greedy ids of each prompt with its adapter, one at a time."""
    results = []
    for name, ids in zip(NAMES, prompts(), strict=True):
        inputs = torch.tensor([ids])
        out = reference_of(base, name, dtype).generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NUM_TOKENS, do_sample=False
        )
        results.append(out[0, len(ids) :].tolist())
    return results


@contextmanager
def engine_of(
    base: Path, root: Path, patch: pytest.MonkeyPatch, make_adapter: Callable[..., Path], **options: Any
) -> Iterator[Engine]:
    """An engine whose loader gives the adapters of this page in the place of the files' own."""
    for name in ADAPTERS:
        if not (root / name).exists():
            make_adapter(base, root / name, 0, r=4, target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def read(directory: Path, spec: ModelSpec, **arguments: Any) -> Any:
        _, report = read_adapter(directory, spec, **arguments)
        return weights_of(directory.name, spec, model, arguments["dtype"]), report

    patch.setattr(reader, "read_adapter", read)
    config = EngineConfig(
        base_model=str(base),
        adapter_root=str(root),
        num_threads=1,
        max_loras=2,
        max_lora_rank=20,
        max_cpu_loras=5,
        max_model_len=64,
        max_num_seqs=8,
        max_batched_tokens=16,
        kv_block_size=4,
        **options,
    )
    with Engine(config) as engine:
        yield engine


def says(engine: Engine) -> list[list[int]]:
    found = engine.generate(prompts(), adapter_ids=NAMES, max_tokens=NUM_TOKENS)
    assert engine.status().check_errors == []
    return [completion.token_ids for completion in found]


@on_cpu
@pytest.mark.parametrize("form", ["compiled", "products"])
def test_all_kinds_in_one_batch_say_what_their_models_say(
    form: str,
    base: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice, with more adapters than a step may mix: what is evicted between comes back whole."""
    if form == "products":
        monkeypatch.setattr(native, "library", lambda: None)
    wanted = wanted_of(base, torch.float32)
    assert len({tuple(ids) for ids in wanted}) == len(wanted)
    with engine_of(base, tmp_path, monkeypatch, make_adapter, device="cpu", dtype="float32") as engine:
        assert says(engine) == wanted
        assert says(engine) == wanted
        assert engine.status().counters["device_evictions"] > 0


@on_cpu
def test_in_bfloat16_they_say_about_the_same(
    base: Path, make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token's logits, beside those of transformers in bfloat16 with parts in bfloat16: that rounds
    each linear once, this one the base product, the folded bias and the sum. A vector that is missing is far
    outside."""

    def error(found: torch.Tensor, exact: torch.Tensor) -> float:
        return float((found.float() - exact).norm() / exact.norm())

    @torch.inference_mode()
    def logits_of(name: str, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
        found: torch.Tensor = reference_of(base, name, dtype)(torch.tensor([ids])).logits
        return found[0, -1]

    errors, rounding, others = [], [], []
    with engine_of(base, tmp_path, monkeypatch, make_adapter, device="cpu", dtype="bfloat16") as engine:
        for name, ids in zip(NAMES, prompts(), strict=True):
            exact = logits_of(name, ids, torch.float32)
            errors.append(error(first_logits(engine, monkeypatch, name, ids), exact))
            rounding.append(error(logits_of(name, ids, torch.bfloat16), exact))
            others.append(error(logits_of("", ids, torch.float32), exact))
    assert all(mine < 3 * its for mine, its in zip(errors, rounding, strict=True)), (errors, rounding)
    assert all(3 * mine < its for name, mine, its in zip(NAMES, errors, others, strict=True) if name)


def first_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, ids: list[int]) -> torch.Tensor:
    """What the sampler is given for the token behind a prompt, alone."""
    seen: list[torch.Tensor] = []
    own = engine.runner.logits

    def note(*arguments: Any) -> torch.Tensor:
        found = own(*arguments)
        seen.append(found.float().clone())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "logits", note)
        engine.generate([ids], adapter_ids=[name], max_tokens=1)
    return seen[-1][-1]


@on_cpu
def test_an_adapter_scale_holds_for_plain_adapters_alone(
    base: Path, make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompts()[1]
    with engine_of(base, tmp_path, monkeypatch, make_adapter, device="cpu", dtype="float32") as engine:

        def answer(name: str, scale: float) -> list[int]:
            (found,) = engine.generate(
                [ids], adapter_ids=[name], adapter_scales=[scale], max_tokens=NUM_TOKENS
            )
            return found.token_ids

        assert answer("plain", 0.5) != answer("plain", 1.0)
        for _ in range(2):  # While it is read, and when it is there.
            with pytest.raises(InvalidArgumentError, match=r"adapter_scale=0\.5 .* allowed are 0 and 1"):
                answer("everything", 0.5)
        assert answer("everything", 0.0) == answer("", 1.0) != answer("everything", 1.0)
        assert engine.status().check_errors == []


@needs_triton
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["one_by_one", "as_graphs"])
def test_all_kinds_in_one_batch_through_triton(
    enforce_eager: bool,
    base: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "serves_paged", lambda model: True)
    options = {"device": DEVICE, "dtype": "float32", "enforce_eager": enforce_eager}
    with engine_of(base, tmp_path, monkeypatch, make_adapter, **options) as engine:
        assert says(engine) == wanted_of(base, torch.float32)
        graphs = engine.runner.graphs
        assert (graphs is None) == enforce_eager
        assert graphs is None or graphs.replays.total() > 0


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests run in this process")
def test_passes_in_the_interpreter(pass_interpreted: Callable[..., str]) -> None:
    assert "2 passed" in pass_interpreted(__file__)
