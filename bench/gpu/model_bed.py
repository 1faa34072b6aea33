"""A whole model with random weights, served through the engine's own runner, and steps for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from manylora.adapters.placement import AdapterUse
from manylora.adapters.pool_tensors import PoolTensors
from manylora.config import EngineConfig
from manylora.engine.start_up.graph_start import record_graphs
from manylora.engine.start_up.make_runner import make_runner
from manylora.engine.start_up.packing_check import prove_packing
from manylora.engine.step import Step, StepSequence, make_step
from manylora.model.compiling import compile_forward
from manylora.model.loading import compiles, convert_model, logits_tolerance
from manylora.model.lora_layers import GatedLinear
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.gpu.part_model import RANK

CONTEXT = 128
"""Tokens in the cache of each sequence of a decode step, its own among them: few, since what is asked is how
fast weights are read."""

_LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_TINY = _LLAMA_8B | {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


class ModelBed:
    """The model, its pool with adapters of rank 16, and its runner.

    Args:
        max_adapters: most adapters of a step.
        is_tiny: two small layers in place of Llama-3-8B's.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, max_adapters: int, is_tiny: bool) -> None:
        sizes = _TINY if is_tiny else _LLAMA_8B
        self.hf_config = LlamaConfig(**sizes)
        max_model_len = sizes["max_position_embeddings"]
        self.config = EngineConfig(
            base_model="random",
            device=str(device),
            max_loras=max_adapters,
            max_lora_rank=RANK,
            max_model_len=max_model_len,
            max_num_seqs=4 if is_tiny else 64,
            max_batched_tokens=max_model_len,
        )
        with _timed("random weights"):
            module = _random_model(self.hf_config, device, dtype)
        with _timed("sites"):
            self.model = convert_model(module, Path(), self.hf_config, int(max_model_len), device)
        self.is_compiled = False
        if compiles(self.config, device):
            with _timed("compiled"):
                self.is_compiled = compile_forward(
                    self.model.module, self.model.context, logits_tolerance(dtype)
                )
        with _timed("pool, kernels"):
            self.pool = PoolTensors(self.model.spec, max_adapters, RANK, dtype, device)
            # Without a GPU the interpreter runs what a GPU would.
            self.runner = make_runner(self.model, self.config, self.pool, paged=True)
        with _timed("packing proved"):
            prove_packing(self.runner)
        with _timed("graphs"):
            record_graphs(self.runner, self.config)
        # Behind the graphs: their proof leaves zeros in the first page.
        for kind in self.pool.kinds:
            kind["a"].normal_(std=kind["a"].shape[-1] ** -0.5)
            kind["b"].normal_(std=0.02)

    @property
    def state(self) -> str:
        """What of the engine's ways is in use, since it goes on without what fails."""
        num_gated = sum(isinstance(module, GatedLinear) for module in self.model.module.modules())
        graphs = self.runner.graphs
        recorded = "no graphs" if graphs is None else f"graphs of {len(graphs.buckets)} sizes"
        return f"{'compiled' if self.is_compiled else 'not compiled'}, {num_gated} gated units, {recorded}"

    @property
    def num_replays(self) -> int:
        """Steps that were replayed from graphs so far."""
        return 0 if self.runner.graphs is None else self.runner.graphs.replays.total()

    def weight_bytes(self) -> int:
        """Of the linears in layers and of the head: what a decode step reads of the base model."""
        linears = sum(
            kind.num_layers * kind.in_features * sum(kind.out_features) for kind in self.model.spec.kinds
        )
        head = self.hf_config.vocab_size * self.hf_config.hidden_size
        return (linears + head) * self.model.dtype.itemsize

    def adapter_bytes(self, num_adapters: int) -> int:
        """Of so many adapters of rank 16."""
        one = sum(kind.page_elements() for kind in self.model.spec.kinds)
        return num_adapters * one * self.model.dtype.itemsize

    def decode(self, num_seqs: int, num_adapters: int) -> Step:
        """A step of one token of each sequence; adapters take turns among them."""
        return self._step([CONTEXT] * num_seqs, 1, num_adapters)

    def prefill(self, num_tokens: int, num_seqs: int, num_adapters: int) -> Step:
        """A step of fresh prompts of `num_tokens` together; adapters take turns among them."""
        return self._step([num_tokens // num_seqs] * num_seqs, 0, num_adapters)

    def run(self, step: Step) -> torch.Tensor:
        """The step, as the engine computes it: [sequences, vocabulary]."""
        return self.runner.logits(step)

    def launch(self, step: Step) -> object:
        """The step and the sampler behind it; the host waits for nothing."""
        return self.runner.launch(step)

    def forward(self, step: Step) -> Callable[[], torch.Tensor]:
        """The model's forward pass alone, on tensors that are there already: what a graph can hold."""
        tensors = self.runner.uploader.upload(step)
        return lambda: self.runner.forward(tensors)

    def _step(self, lengths: list[int], num_new: int, num_adapters: int) -> Step:
        size, sequences, next_block = self.config.kv_block_size, [], 0
        adapters = [
            AdapterUse(version=str(page), scale=1.0, pages=((page,),) * len(self.pool.kinds))
            for page in range(num_adapters)
        ]
        for index, length in enumerate(lengths):
            num_blocks = -(-length // size)
            first = length - num_new if num_new else 0
            sequences.append(
                StepSequence(
                    token_ids=[(7 * index + 3 * t) % self.hf_config.vocab_size for t in range(first, length)],
                    context=length,
                    table=list(range(next_block, next_block + num_blocks)),
                    adapter=adapters[index % num_adapters] if num_adapters else None,
                )
            )
            next_block += num_blocks
        return make_step(1, sequences)


@contextmanager
def _timed(phase: str) -> Iterator[None]:
    """Print the seconds of a phase: which of them needs how many is what the next run is planned by."""
    begin = time.monotonic()
    yield
    print(f"# model, {phase}: {time.monotonic() - begin:.1f} s", flush=True)


def _random_model(hf_config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Made on the device: 16 GB would take minutes on a host."""
    with torch.device(device):
        module: torch.nn.Module = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    return module.eval().requires_grad_(False)
