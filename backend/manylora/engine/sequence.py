"""One prompt and its generated tokens."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from manylora.engine.kv_cache import Key
from manylora.engine.token_counts import TokenCounts
from manylora.messages import SamplingParams

if TYPE_CHECKING:
    from manylora.adapters.adapter import Lease
    from manylora.adapters.placement import AdapterUse


class State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Owned by the engine thread. Token ids only grow; a preempted sequence computes its tokens anew.

    A step can be scheduled while the one before it still runs on the device: it then reads that one's tokens
    there, and here they are pending.
    """

    id: int
    """Its number in this engine."""
    request_id: int = 0
    """What its session calls it: the `id` of its answer."""
    token_ids: list[int]
    """Prompt, then what was generated."""
    num_prompt: int
    params: SamplingParams
    seed: int
    lease: Lease | None
    """Its hold on the adapter, from the queue to its end. None: the base model."""
    adapter: AdapterUse | None = None
    """What steps use of the adapter, while the sequence runs. None: the base model, or it waits."""
    adapter_id: str = ""
    adapter_scale: float = 1.0
    """Multiplies the adapter's own scaling."""
    priority: int = 0
    """Higher runs earlier."""
    deadline_ms: int = 0
    """What was allowed, for the message."""
    deadline_s: float = 0.0
    """When it passes, on the monotonic clock; 0: never."""
    arrival: int = 0
    """Counts up in the order in which sequences came. Filled by the scheduler."""
    state: State = State.WAITING
    num_computed: int = 0
    """Tokens whose keys and values are in the cache once the steps that were scheduled are done."""
    num_pending: int = 0
    """Tokens behind `token_ids` that scheduled steps will give: their ids are not known here yet."""
    sampled_row: int = -1
    """Where the last scheduled step that samples its next token does so, counted among those that sample
    there. Filled by the scheduler."""
    table: list[int] = field(default_factory=list)
    """KV blocks, in order."""
    table_array: np.ndarray[tuple[int], np.dtype[np.int32]] | None = None
    """`table` as steps' tensors take it, by `blocks`; None while it holds no blocks."""
    keys: list[Key] = field(default_factory=list)
    """Prefix keys of the full blocks of token_ids."""
    num_passed: int = 0
    """Sequences behind it, with an adapter, that were admitted while this one found no room for its own."""
    counts: TokenCounts | None = None
    """Filled when a step is built, for a sequence with penalties."""

    @property
    def order(self) -> tuple[int, int]:
        """Its place among all sequences, the same for life: what comes first sorts first."""
        return (-self.priority, self.arrival)

    def blocks(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The first `count` of its KV blocks. Made anew only when the table has grown, since a long context
        has hundreds and each step wants them."""
        if self.table_array is None or len(self.table_array) < count:
            self.table_array = np.asarray(self.table, dtype=np.int32)
        return self.table_array[:count]

    @property
    def num_generated(self) -> int:
        """Tokens that are known."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Tokens, known and pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_to_compute(self) -> int:
        """1 when decoding, more while the prompt is not done."""
        return self.num_tokens - self.num_computed

    @property
    def version(self) -> str:
        """Content hash of the adapter that computes it, empty for the base model. Only while it runs."""
        return self.adapter.version if self.adapter is not None else ""

    @property
    def namespace(self) -> str:
        """What decides keys and values besides the tokens. Only while it runs. Two scales of an adapter are
        two namespaces; at scale 0 it adds nothing, and the base model's are the right ones."""
        if self.adapter is None or self.adapter_scale == 0:
            return ""
        return self.version if self.adapter_scale == 1 else f"{self.version} x {self.adapter_scale!r}"
