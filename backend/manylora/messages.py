"""The messages between front ends and the engine: msgpack over `ipc.py`, or objects within one process."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are sampled and when a sequence ends. Validated by `parameters.py`, trusted after that."""

    max_tokens: int = 128
    min_tokens: int = 0
    ignore_eos: bool = False
    """Go on after one of the model's end tokens. Those of `stop_token_ids` still end the sequence."""
    stop_token_ids: tuple[int, ...] = ()
    """They end the sequence, as end tokens do."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = 0
    """Alternatives reported for each generated token; 0: no log probabilities."""


# Front end to engine.


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """First message of a connection; answered with EngineInfo."""


class Generate(msgspec.Struct, tag="generate", frozen=True, kw_only=True):
    """Start a sequence. Answered with Tokens, the last with a finish_reason, or with one Failed."""

    id: int
    """Chosen by the front end, unique on its connection."""
    input_ids: list[int]
    adapter_id: str = ""
    adapter_scale: float = 1.0
    """Multiplies the adapter's own scaling. Ignored for the base model."""
    priority: int = 0
    """Higher runs earlier."""
    deadline_ms: int = 0
    """As the user gave it, for messages; 0: no deadline."""
    deadline_s: float = 0.0
    """When it passes, on the machine's monotonic clock (`time.monotonic`, the same in all processes)."""
    params: SamplingParams = SamplingParams()


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """End the sequence and free what it holds. Answered with Failed(CANCELLED), unless it has ended
    already."""

    id: int


class GetStatus(msgspec.Struct, tag="status", frozen=True):
    """Answered with Status."""


# Engine to front end.


class EngineInfo(msgspec.Struct, tag="info", frozen=True, kw_only=True):
    """What a front end needs to check and tokenise requests."""

    base_model: str
    """Directory with the tokenizer."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Log probabilities (natural, of the model's own distribution, before penalties, temperature and filters)
    at one generated token."""

    logprob: float
    """Of the token itself."""
    top: list[tuple[int, float]]
    """The likeliest ids with their log probabilities, best first, equal ones by id; as many as were
    requested."""


class Tokens(msgspec.Struct, tag="tokens", frozen=True, kw_only=True):
    """New tokens of a sequence, in order."""

    id: int
    token_ids: list[int]
    finish_reason: str = ""
    """`stop` or `length` with the last tokens, empty before."""
    adapter_version: str = ""
    """Content hash of the adapter that computes the sequence; empty for the base model."""
    logprobs: list[TokenLogprobs] = []
    """One for each of `token_ids` if they were requested, otherwise empty."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The sequence ended with an error."""

    id: int
    code: str
    message: str


class AdapterState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    state: str
    """loading, host, device or failed."""
    version: str = ""
    rank: int = 0
    num_bytes: int = 0
    num_running: int = 0
    pinned: bool = False
    outdated: bool = False
    """New requests get a newer version, or none: this one goes with its last sequence."""
    files_error: str = ""
    """Why the current files cannot be served, while this older version is. Empty: they can."""


class Status(msgspec.Struct, tag="engine_status", frozen=True, kw_only=True):
    """The state of the engine between two steps."""

    adapters: list[AdapterState]
    counters: dict[str, int]
    """Monotonic: steps, prompt_tokens, generated_tokens, accepted (sequences, each of which is later
    counted once as finished, failed or cancelled), finished, host_loads, host_evictions, device_copies,
    device_evictions, cancelled, failed (deadline_missed among them), preemptions, prefix_hit_tokens."""
    gauges: dict[str, int]
    """Now: running, waiting, kv_blocks_free, kv_blocks_total, pool_pages_free, pool_pages_total, pool_bytes,
    host_adapters, device_adapters."""
    check_errors: list[str] = []
    """Violated invariants that `check()` of the engine's parts found. Empty: none."""


class Batch(msgspec.Struct, tag="batch", frozen=True):
    """All events of one step for one front end."""

    events: list[Tokens | Failed]


ToEngine = Hello | Generate | Cancel | GetStatus
FromEngine = EngineInfo | Batch | Status
