"""How large the KV cache is."""

from __future__ import annotations

from manylora.config import EngineConfig
from manylora.errors import InvalidArgumentError
from manylora.model.loading import PROBE_LENGTHS

_DEFAULT_TOKENS_PER_SEQ = 1024


def num_kv_blocks(config: EngineConfig, max_model_len: int, bytes_per_token: int) -> int:
    """Blocks of the KV cache.

    Raises:
        InvalidArgumentError: `kv_cache_bytes` holds less than one sequence of `max_model_len`.
    """
    block_bytes = bytes_per_token * config.kv_block_size
    for_probes = sum(-(-length // config.kv_block_size) for length in PROBE_LENGTHS)
    needed = max(for_probes, -(-max_model_len // config.kv_block_size))
    default = config.max_num_seqs * -(-_DEFAULT_TOKENS_PER_SEQ // config.kv_block_size)
    num_blocks = config.kv_cache_bytes // block_bytes if config.kv_cache_bytes else max(default, needed)
    if num_blocks < needed:
        raise InvalidArgumentError(
            f"kv_cache_bytes={config.kv_cache_bytes} holds {num_blocks * config.kv_block_size} tokens; "
            f"one sequence of max_model_len={max_model_len}, and the comparison at start, need "
            f"{needed * block_bytes} bytes"
        )
    return num_blocks
