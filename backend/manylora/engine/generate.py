"""Generation inside this process: prompts in, finished texts out. What scripts, tests and benchmarks call."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.errors import InvalidArgumentError, from_code
from manylora.messages import Cancel, EngineInfo, Failed, Generate, SamplingParams, Tokens
from manylora.parameters import parse
from manylora.protocol import check_input_ids
from manylora.text_stream import TextStream

if TYPE_CHECKING:
    from manylora.engine.engine import Engine
    from manylora.text import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages of `{role, content}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished sequence."""

    text: str
    """What was generated, without special tokens and the stop string."""
    token_ids: list[int]
    """Generated ids, the ending EOS among them."""
    finish_reason: str
    """`stop` or `length`."""
    num_input_tokens: int
    adapter_version: str
    """Content hash of the adapter; empty for the base model."""


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    adapter_ids: Sequence[str] | None = None,
    stop: Sequence[str] = (),
    **sampling: object,
) -> list[Completion]:
    """Run prompts to their end, together in one batch.

    Args:
        prompts: texts, token ids or chat messages, mixed as you like.
        adapter_ids: one adapter per prompt, "" for the base model. None: the base model for all.
        stop: strings that end a sequence.
        sampling: fields of `SamplingParams`, the same for all prompts.

    Returns:
        One completion per prompt, in order.

    Raises:
        InvalidArgumentError: an unknown option, an empty prompt, one that is too long or has unknown ids.
        ManyloraError: the first failure of a sequence; the others are cancelled.
    """
    names = [""] * len(prompts) if adapter_ids is None else list(adapter_ids)
    if len(names) != len(prompts):
        raise InvalidArgumentError(f"{len(prompts)} prompts, {len(names)} adapter_ids: must be as many")
    params = _params(sampling)
    inputs = [_encode(engine.tokenizer, prompt, engine.info) for prompt in prompts]
    events: queue.SimpleQueue[list[Tokens | Failed]] = queue.SimpleQueue()
    session = engine.connect(events.put)
    streams = [TextStream(engine.tokenizer, stop=stop, min_tokens=params.min_tokens) for _ in prompts]
    results: list[Completion | None] = [None] * len(prompts)
    texts: list[list[str]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    try:
        for number, (input_ids, name) in enumerate(zip(inputs, names, strict=True)):
            session.send(Generate(id=number, input_ids=input_ids, adapter_id=name, params=params))
        while any(result is None for result in results):
            for event in events.get():
                i = event.id
                if results[i] is not None:
                    continue
                if isinstance(event, Failed):
                    raise from_code(event.code, event.message)
                text, num_taken = streams[i].add(event.token_ids)
                texts[i].append(text)
                ids[i] += event.token_ids[:num_taken]
                if event.finish_reason or streams[i].stopped:
                    if not event.finish_reason:
                        session.send(Cancel(i))
                    texts[i].append(streams[i].finish())
                    results[i] = Completion(
                        text="".join(texts[i]),
                        token_ids=ids[i],
                        finish_reason="stop" if streams[i].stopped else event.finish_reason,
                        num_input_tokens=len(inputs[i]),
                        adapter_version=event.adapter_version,
                    )
    finally:
        session.close()
    return [result for result in results if result is not None]


def _params(sampling: Mapping[str, object]) -> SamplingParams:
    known = SamplingParams.__struct_fields__
    unknown = sorted(set(sampling) - set(known))
    if unknown:
        raise InvalidArgumentError(f"unknown option {', '.join(unknown)}; known are {', '.join(known)}")
    given = {name: value for name, value in sampling.items() if value is not None}
    return SamplingParams(**parse(given, "option"))


def _encode(tokenizer: Tokenizer, prompt: Prompt, info: EngineInfo) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif prompt and isinstance(prompt[0], Mapping):
        ids = tokenizer.encode_chat(prompt)  # type: ignore[arg-type]  # messages, by their first element
    else:
        ids = [int(token_id) for token_id in prompt]  # type: ignore[arg-type]  # ids, by elimination
    check_input_ids(ids, info)
    return ids
