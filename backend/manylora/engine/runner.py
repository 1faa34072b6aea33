"""Runs one step on the model, and proves at start that packing changes nothing.

Shape key: T tokens of a step, V vocabulary.
"""

from __future__ import annotations

import logging

import torch
from manylora_kernels import SitePool
from manylora_kernels.attention.plan import MAX_HEAD_SIZE
from manylora_kernels.lora.device_form import form_of

from manylora.adapters.device_pool import DevicePool
from manylora.config import EngineConfig
from manylora.engine import logprobs, sampler
from manylora.engine.batch import Batch, BatchBuilder, Item, StepTensors
from manylora.engine.flight import Flight, nothing_sampled
from manylora.engine.graph_recorder import recorder_for
from manylora.engine.sequence import Sequence
from manylora.engine.start_up.capacity import num_kv_blocks
from manylora.engine.start_up.graph_start import allowed_difference, try_start
from manylora.engine.start_up.warm_up import prepare_kernels
from manylora.engine.step_graphs import StepGraphs
from manylora.errors import UnsupportedError
from manylora.memory import zeros
from manylora.messages import SamplingParams
from manylora.model.loading import LoadedModel
from manylora.model.parts import num_pages_of
from manylora.model.step_context import LayerCache

log = logging.getLogger(__name__)


class Runner:
    """The model, its KV tensors and the device pool's views: everything a step touches.

    Args:
        paged: whether attention and adapters go through Triton's kernels; None: on CUDA, for heads that fit.
        num_blocks: of the KV cache; None: what `capacity.num_kv_blocks` says.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        pool: DevicePool,
        paged: bool | None = None,
        num_blocks: int | None = None,
    ) -> None:
        self.model = model
        self.runs_ahead = _runs_ahead(model)
        """Whether a step is launched before the one in front of it has landed."""
        self.graphs: StepGraphs | None = None
        """Recorded decode steps, from `capture_graphs`."""
        if num_blocks is None:
            num_blocks = num_kv_blocks(config, model.max_model_len, model.cache_bytes_per_token())
        paged = _serves_paged(model) if paged is None else paged
        prepare_kernels(model, config, pool.dtype, paged)
        for site in model.sites:
            kind = model.spec.kinds[site.kind]
            parts = {name: tensor[site.row] for name, tensor in pool.kinds[site.kind].items()}
            site.pool = SitePool(**parts, widths=kind.out_features)
        self.builder = BatchBuilder(
            device=model.device,
            block_size=config.kv_block_size,
            max_loras=config.max_loras,
            max_pages=num_pages_of(config.max_lora_rank),
            num_kinds=len(model.spec.kinds),
            paged=paged,
            form=form_of(model.device, paged or None),
        )
        self.make_caches(num_blocks)

    def make_caches(self, num_blocks: int) -> None:
        """Give each layer a KV cache of so many blocks, in the place of the one that it has. Graphs that read
        that one must not be replayed any more."""
        self.num_blocks = num_blocks
        caches = self.model.context.caches
        # Before the new ones: both may be more than there is.
        caches.clear()
        for layer, shape in self.model.layers.items():
            caches[layer] = _layer_cache(self.model, shape, num_blocks * self.builder.block_size)

    @torch.inference_mode()
    def launch(self, batch: Batch, previous: Flight | None = None) -> Flight:
        """Give a step to the device, up to its tokens. On CUDA the host waits for nothing.

        Args:
            batch: the step.
            previous: the step before, where it has not landed and its tokens are read by this one.
        """
        logits = self.logits(batch, previous)
        items = batch.sampling_items
        if not items:
            return Flight(batch, nothing_sampled(self.model.device), None)
        # Before the sampler: it changes logits in place.
        distributions = logprobs.distributions(logits, items)
        sampled = sampler.choose(logits, items, self.model.eos_token_ids)
        asked = None if distributions is None else distributions.gather(sampled.ids_B)
        return Flight(batch, sampled, asked)

    def logits(self, batch: Batch, previous: Flight | None = None) -> torch.Tensor:
        """[number of sampling items, V], in the order that `batch` has afterwards (at least one row)."""
        if self.graphs is not None and all(item.num_tokens == 1 and item.samples for item in batch.items):
            num_rows = self.graphs.bucket_of(len(batch.items))
            if num_rows is not None:
                return self.graphs.run(self.builder.build(batch, previous, num_rows))[: len(batch.items)]
        return self._forward(self.builder.build(batch, previous))

    def _forward(self, step: StepTensors) -> torch.Tensor:
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

        It waits for all work: to be asked behind a failure only.
        """
        if self.model.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self.model.device)
        except RuntimeError as error:
            log.error("the device is of no more use: %s", error)
            return False
        return True

    @torch.inference_mode()
    def prove_packing(self) -> None:
        """Compare packed steps, chunked and with cached context, with the same rows alone in transformers.

        Raises:
            UnsupportedError: they differ; the model mixes rows or positions in a way that is not known here.
        """
        scale = max(float(logits.abs().max()) for logits in self.model.probe_logits)
        tolerance = allowed_difference(self.model.dtype, scale)
        for sequence, position, found in self._probe_steps():
            wanted = self.model.probe_logits[sequence][position]
            difference = float((found.float() - wanted).abs().max())
            if not difference <= tolerance:
                raise UnsupportedError(
                    f"{type(self.model.module).__name__} computes differently when sequences share a "
                    f"step: logits of probe {sequence} at position {position} differ by {difference:.3g}, "
                    f"allowed is {tolerance:.3g}; this architecture is not served"
                )

    @torch.inference_mode()
    def capture_graphs(self, config: EngineConfig) -> None:
        """Record decode steps as graphs where the paged kernels serve; call it after `prove_packing`.

        A model that cannot be recorded, or replays other numbers, is served without, and the log says so.
        """
        if not self.builder.paged or config.enforce_eager:
            return
        sequences = self._probe_sequences()[: config.max_num_seqs]
        for sequence in sequences:
            # The cache holds the probes: their last tokens are decodes.
            sequence.num_computed = len(sequence.token_ids) - 1
        self.graphs = try_start(
            self.model,
            self.builder,
            self._forward,
            Batch([Item(sequence, 1) for sequence in sequences]),
            config.max_num_seqs,
            recorder_for(self.model.device),
        )

    def _probe_sequences(self) -> list[Sequence]:
        """One for each probe, with blocks from the first on."""
        sequences, next_block = [], 0
        for index, tokens in enumerate(self.model.probe_ids):
            num = -(-len(tokens) // self.builder.block_size)
            sequences.append(_probe_sequence(index, tokens, list(range(next_block, next_block + num))))
            next_block += num
        return sequences

    def _probe_steps(self) -> list[tuple[int, int, torch.Tensor]]:
        """(probe, position, logits) of three steps: whole prompts beside chunks, more chunks, decodes."""
        ids = self.model.probe_ids
        sequences = self._probe_sequences()
        results = []
        plan = [[(0, 8), (1, 1), (2, 5)], [(0, 10), (2, 2)], [(0, 1), (2, 1)]]
        for step in plan:
            items = []
            for index, count in step:
                sequence = sequences[index]
                sequence.token_ids = ids[index][: sequence.num_computed + count]
                items.append(Item(sequence, count))
            batch = Batch(items)
            logits = self.logits(batch)
            for row, item in enumerate(batch.sampling_items):
                results.append((item.sequence.id, item.end - 1, logits[row]))
            for item in batch.items:
                item.sequence.num_computed += item.num_tokens
        return results


def _probe_sequence(index: int, tokens: list[int], table: list[int]) -> Sequence:
    return Sequence(
        id=index,
        token_ids=tokens,
        num_prompt=len(tokens),
        params=SamplingParams(),
        seed=0,
        lease=None,
        table=table,
    )


def _runs_ahead(model: LoadedModel) -> bool:
    """On CUDA the host has the next step ready when the device is; on a CPU both are the same threads."""
    return model.device.type == "cuda"


def _serves_paged(model: LoadedModel) -> bool:
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
