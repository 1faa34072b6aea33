"""Client of a Manylora server, which serves many LoRA adapters on one base model.

Needs tritonclient and numpy, never torch.
"""

from manylora_client.async_client import AsyncClient
from manylora_client.async_stream import AsyncStream
from manylora_client.client import Client
from manylora_client.errors import (
    Cancelled,
    ConnectionFailed,
    Internal,
    InvalidArgument,
    ManyloraClientError,
    NotFound,
    Timeout,
    Unavailable,
    Unsupported,
)
from manylora_client.options import Options
from manylora_client.stream import Stream
from manylora_client.types import Chunk, Completion, Message, TokenLogprob

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Chunk",
    "Client",
    "Completion",
    "ConnectionFailed",
    "Internal",
    "InvalidArgument",
    "ManyloraClientError",
    "Message",
    "NotFound",
    "Options",
    "Stream",
    "Timeout",
    "TokenLogprob",
    "Unavailable",
    "Unsupported",
]
