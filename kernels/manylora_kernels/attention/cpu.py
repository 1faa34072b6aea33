"""Attention of decodes on a CPU, compiled: `attention_cpu.c`, and its arguments.

Shape key: B sequences, H query heads, V key/value heads, D key size, E value size, C longest context, R rows
of the cache.
"""

from __future__ import annotations

import ctypes

import torch

from manylora_kernels.compiled import DTYPES, library

_MAX_LANES = 16


class _Decode(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "context", "positions", "q", "out")),
        *((name, ctypes.c_int64) for name in ("q_head", "q_row", "out_head", "out_row")),
        *((name, ctypes.c_int64) for name in ("num_seqs", "num_kv", "per_kv", "key_size", "value_size")),
        ("max_context", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
        ("scratch_per_thread", ctypes.c_int64),
        ("type", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    )


def serves(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether there is a compiled form for these."""
    return (
        q.device.type == "cpu"
        and q.dtype in DTYPES
        and q.dtype == keys.dtype == values.dtype
        and q.stride(2) == 1
        and library() is not None
    )


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: torch.Tensor,
    positions: torch.Tensor,
    num_kv: int,
    scaling: float,
    window: int = 0,
) -> torch.Tensor:
    """Attend with one query for each sequence, to keys and values where they lie in the cache.

    `out[b, h] = sum_c softmax_c(scaling * <q[h, b], key[c, v]>) value[c, v]`, v = h // (H / V), over tokens
    c = max(0, positions[b] + 1 - window) .. positions[b]. A sequence's bits do not depend on the others.

    Args:
        q: [H, B, D], any strides but the last, which is 1.
        keys: [R, V * D], contiguous.
        values: [R, V * E], contiguous.
        context: [B, C] int64, the row of each token; beyond a sequence's position it is not read.
        positions: [B] int64, the query's own position, below C.
        num_kv: V.
        window: tokens seen at most, the query's own among them; 0 is all.

    Returns:
        [B, H, E]
    """
    loaded = library()
    assert loaded is not None, "no compiled form here"
    num_heads, num_seqs, key_size = q.shape
    value_size, max_context = values.shape[1] // num_kv, context.shape[1]
    per_kv, num_threads = num_heads // num_kv, torch.get_num_threads()
    out = q.new_empty(num_seqs, num_heads, value_size)
    per_thread = per_kv * (max_context + 2 + _MAX_LANES + value_size)
    scratch = torch.empty(num_threads * per_thread, dtype=torch.float32)
    order = _Decode(
        keys.data_ptr(),
        values.data_ptr(),
        context.data_ptr(),
        positions.data_ptr(),
        q.data_ptr(),
        out.data_ptr(),
        q.stride(0),
        q.stride(1),
        out.stride(1),
        out.stride(0),
        num_seqs,
        num_kv,
        per_kv,
        key_size,
        value_size,
        max_context,
        window,
        scratch.data_ptr(),
        per_thread,
        DTYPES[q.dtype],
        scaling,
    )
    loaded.manylora_decode(ctypes.byref(order), num_threads)
    return out
