"""Executes steps on the model.

Shape key: T tokens of a step, S sequences that sample, V vocabulary.
"""

from __future__ import annotations

import logging

import torch
from manylora_kernels import SitePool
from manylora_kernels.attention.plan import MAX_HEAD_SIZE
from manylora_kernels.lora.device_form import form_of

from manylora.adapters.pool_tensors import PoolTensors
from manylora.config import EngineConfig
from manylora.engine import logprobs, sampler
from manylora.engine.flight import Flight, nothing_sampled
from manylora.engine.step import Step
from manylora.engine.step_graphs import StepGraphs
from manylora.engine.step_tensors import StepTensors, Uploader
from manylora.memory import zeros
from manylora.model.loading import LoadedModel
from manylora.model.parts import num_pages_of
from manylora.model.step_context import LayerCache

log = logging.getLogger(__name__)


class Runner:
    """The model, its KV tensors and the device pool's views: everything a step touches.

    Args:
        pool: its pages become those of the model's sites.
        num_blocks: of the KV cache.
        paged: whether attention and adapters go through Triton's kernels.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig, pool: PoolTensors, num_blocks: int, *, paged: bool
    ) -> None:
        self.model = model
        self.runs_ahead = _runs_ahead(model)
        """Whether a step is launched before the one in front of it has landed."""
        self.graphs: StepGraphs | None = None
        """Recorded decode steps, from `start_up.graph_start`."""
        for site in model.sites:
            kind = model.spec.kinds[site.kind]
            parts = {name: tensor[site.row] for name, tensor in pool.kinds[site.kind].items()}
            site.pool = SitePool(**parts, widths=kind.out_features)
        self.uploader = Uploader(
            device=model.device,
            block_size=config.kv_block_size,
            max_loras=config.max_loras,
            max_pages=num_pages_of(config.max_lora_rank),
            num_kinds=len(model.spec.kinds),
            paged=paged,
            form=form_of(model.device, paged or None),
        )
        self._last: Flight | None = None
        """The step before, whose tokens the next one may read."""
        self.make_caches(num_blocks)

    def make_caches(self, num_blocks: int) -> None:
        """Give each layer a KV cache of so many blocks, in the place of the one that it has. Graphs that read
        that one must not be replayed any more."""
        self.num_blocks = num_blocks
        caches = self.model.context.caches
        # Before the new ones: both may be more than there is.
        caches.clear()
        for layer, shape in self.model.layers.items():
            caches[layer] = _layer_cache(self.model, shape, num_blocks * self.uploader.block_size)

    @torch.inference_mode()
    def launch(self, step: Step) -> Flight:
        """Give a step to the device, up to its tokens. On CUDA the host waits for nothing."""
        logits = self.logits(step)
        sampled, asked = nothing_sampled(self.model.device), None
        if step.sampling.num_rows:
            # Before the sampler: it changes logits in place.
            distributions = logprobs.distributions(logits, step.sampling)
            sampled = sampler.choose(logits, step.sampling)
            asked = None if distributions is None else distributions.gather(sampled.ids_B)
        self._last = Flight(step.number, sampled, asked)
        return self._last

    @torch.inference_mode()
    def logits(self, step: Step) -> torch.Tensor:
        """[S, V], at least one row."""
        sampled = self._sampled_before(step)
        if self.graphs is not None and step.is_decode:
            num_rows = self.graphs.bucket_of(step.num_seqs)
            if num_rows is not None:
                return self.graphs.run(self.uploader.upload(step, sampled, num_rows))[: step.num_seqs]
        return self.forward(self.uploader.upload(step, sampled))

    def _sampled_before(self, step: Step) -> torch.Tensor | None:
        """What the step before has sampled, if this one reads any of it."""
        if not step.pending.shape[1]:
            return None
        assert self._last is not None, "a token is pending of no step"
        assert self._last.number == step.number - 1, "a token is pending of another step than the last"
        return self._last.ids_S

    def forward(self, step: StepTensors) -> torch.Tensor:
        """[number of sampled rows, V], operator by operator."""
        with self.model.context.during(step.plan, step.mix):
            output = self.model.module(
                input_ids=step.input_ids,
                position_ids=step.positions,
                use_cache=False,
                # 0 keeps all, without an index.
                logits_to_keep=0 if step.sample_rows is None else step.sample_rows,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def device_answers(self) -> bool:
        """Whether the device can be used further: one that cannot says so to whoever waits for it.

        It waits for all queued work, so call it after a failure only.
        """
        if self.model.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self.model.device)
        except RuntimeError as error:
            log.error("the device is of no more use: %s", error)
            return False
        return True


def _runs_ahead(model: LoadedModel) -> bool:
    """On CUDA the host has the next step ready when the device is; on a CPU both are the same threads."""
    return model.device.type == "cuda"


def serves_paged(model: LoadedModel) -> bool:
    """Whether attention goes through block tables in Triton: on CUDA, for heads that its tiles hold."""
    largest = max(max(key_size, value_size) for _, key_size, value_size in model.layers.values())
    return model.device.type == "cuda" and largest <= MAX_HEAD_SIZE


def _layer_cache(model: LoadedModel, shape: tuple[int, int, int], num_rows: int) -> LayerCache:
    num_heads, key_size, value_size = shape
    return LayerCache(
        keys=zeros((num_rows, num_heads * key_size), model.dtype, model.device),
        values=zeros((num_rows, num_heads * value_size), model.dtype, model.device),
        num_heads=num_heads,
        key_size=key_size,
        value_size=value_size,
    )
