"""Prompts: what a client wants, as plain data. Every front door passes these to a front end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from manylora.errors import InvalidArgumentError
from manylora.front_end.chat_messages import Message
from manylora.messages import Generate, SamplingParams

_DEFAULT_PARAMS = SamplingParams()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One sequence to generate. Exactly one of `text`, `messages` and `input_ids` is set."""

    text: str | bytes | None = None
    """Bytes are UTF-8, decoded only when the prompt is tokenised."""
    chat: bool = False
    """`text` is for the chat template: a conversation as JSON, or else one message of the user."""
    messages: Sequence[Message] | None = None
    """A conversation for the chat template."""
    input_ids: Sequence[int] | None = None
    add_special_tokens: bool = True
    """Begin a text with the tokenizer's special tokens (BOS). A conversation has those of its template."""
    adapter_id: str = ""
    adapter_scale: float = 1.0
    priority: int = 0
    deadline_ms: int = 0
    """From the moment the request arrived; 0: none."""
    stop: tuple[str, ...] = ()
    echo: bool = False
    """The answer begins with the prompt."""
    params: SamplingParams = _DEFAULT_PARAMS

    @property
    def is_chat(self) -> bool:
        return self.chat or self.messages is not None

    def message(self, sequence_id: int, input_ids: list[int], deadline_s: float) -> Generate:
        """The message that starts the sequence in the engine.

        Args:
            input_ids: the prompt, tokenised.
            deadline_s: when the deadline passes, on the monotonic clock; ignored if there is none.
        """
        return Generate(
            id=sequence_id,
            input_ids=input_ids,
            adapter_id=self.adapter_id,
            adapter_scale=self.adapter_scale,
            priority=self.priority,
            deadline_ms=self.deadline_ms,
            deadline_s=deadline_s if self.deadline_ms else 0.0,
            params=self.params,
        )


def make_prompt(values: Mapping[str, Any], **content: Any) -> Prompt:
    """Make a prompt from parameters that have been parsed.

    Args:
        values: by name, as `parameters.parse` returns them.
        content: `text`, `messages` or `input_ids`.

    Raises:
        InvalidArgumentError: two parameters contradict each other.
    """
    sampling = {name: value for name, value in values.items() if name in SamplingParams.__struct_fields__}
    params = SamplingParams(**sampling)
    if params.min_tokens > params.max_tokens:
        raise InvalidArgumentError(
            f"parameter min_tokens: got {params.min_tokens}, allowed is up to max_tokens={params.max_tokens}"
        )
    chat = values.get("chat", False)
    if chat and content.get("input_ids") is not None:
        raise InvalidArgumentError("parameter chat: got true with input_ids, allowed is text_input only")
    return Prompt(
        chat=chat,
        add_special_tokens=values.get("add_special_tokens", True),
        adapter_id=values.get("adapter_id", ""),
        adapter_scale=values.get("adapter_scale", 1.0),
        priority=values.get("request_priority", 0),
        deadline_ms=values.get("deadline_ms", 0),
        stop=values.get("stop", ()),
        echo=values.get("echo", False),
        params=params,
        **content,
    )


class UnreadRequest(Protocol):
    """A request whose prompts have not been parsed yet. If that is expensive, it is done on another
    thread."""

    @property
    def num_prompts(self) -> int:
        """At least one."""

    @property
    def parsing_cost(self) -> int:
        """Cost of parsing everything but the prompts' content, as bytes of text that could be tokenised
        instead."""

    @property
    def num_content_bytes(self) -> int:
        """Cost of tokenising the prompts' content, in the same unit. Used only where parsing is expensive."""

    def read(self) -> Sequence[Prompt]:
        """Parse the request. Called once.

        Raises:
            ManyloraError: the request cannot be served.
        """
