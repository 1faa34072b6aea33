"""Client of a Manylora server, which serves many LoRA adapters on one base model.

Needs tritonclient and numpy, never torch.
"""

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
from manylora_client.stream import Stream
from manylora_client.types import Chunk, Completion, Message

__all__ = [
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
    "Stream",
    "Timeout",
    "Unavailable",
    "Unsupported",
]
