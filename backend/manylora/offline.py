"""The engine for scripts, in this process and without Triton: prompts in, finished answers out."""

from __future__ import annotations

import functools
import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from manylora.engine.engine import Engine as _Engine
from manylora.errors import InvalidArgumentError, from_code
from manylora.front_end.answer import Answer, GrowingAnswer, new_answer
from manylora.front_end.parameters import parse
from manylora.front_end.prompt import Prompt
from manylora.front_end.text import Tokenizer
from manylora.front_end.tokenising import check_size, tokenise
from manylora.messages import Cancel, Failed, Generate, SamplingParams, TokenLogprobs, Tokens
from manylora.token_checks import check_stop_token_ids

T = TypeVar("T")

PromptContent = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages of `{role, content}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished sequence."""

    text: str
    """What was generated, without special tokens and the stop string."""
    token_ids: list[int]
    """Generated ids, the ending one among them."""
    finish_reason: str
    """`stop` or `length`."""
    num_input_tokens: int
    adapter_version: str
    """Content hash of the adapter; empty for the base model."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `token_ids`; None unless requested."""


class Engine(_Engine):
    """A base model with many adapters, in this process.

    >>> with Engine(EngineConfig(base_model="model", adapter_root="adapters")) as engine:  # doctest: +SKIP
    ...     engine.generate(["Hello"], adapter_ids=["pirate"], max_tokens=20)
    """

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer, read on first use."""
        return Tokenizer.load(self.info.base_model)

    def generate(
        self,
        prompts: Sequence[PromptContent],
        *,
        adapter_ids: Sequence[str] | None = None,
        adapter_scales: Sequence[float] | None = None,
        priorities: Sequence[int] | None = None,
        deadline_ms: int = 0,
        stop: Sequence[str] = (),
        add_special_tokens: bool = True,
        **sampling: object,
    ) -> list[Completion]:
        """Run prompts to their end, together in one batch.

        Args:
            prompts: texts, token ids or chat messages, mixed as you like.
            adapter_ids: one adapter per prompt, "" for the base model. None: the base model for all.
            adapter_scales: what multiplies each adapter's own scaling. None: 1 for all.
            priorities: one per prompt, higher runs earlier. None: 0 for all.
            deadline_ms: time for the whole call; 0: unlimited.
            stop: strings that end a sequence.
            add_special_tokens: those with which the tokenizer begins a text (BOS), unless the text begins
                with them.
            sampling: fields of `SamplingParams`, the same for all prompts.

        Returns:
            One completion per prompt, in order.

        Raises:
            InvalidArgumentError: an unknown option, an empty prompt, one that is too long or has unknown ids.
            UnavailableError: the deadline has passed.
            ManyloraError: the first failure of a sequence; the others are cancelled.
        """
        begun_s = time.monotonic()
        params = _params(sampling)
        check_stop_token_ids(params, self.info)
        deadline_ms = parse({"deadline_ms": deadline_ms}, "option")["deadline_ms"]
        answers, messages = [], []
        for number, (content, name, scale, priority) in enumerate(
            zip(
                prompts,
                _per_prompt("adapter_ids", adapter_ids, "", len(prompts)),
                _per_prompt("adapter_scales", adapter_scales, 1.0, len(prompts)),
                _per_prompt("priorities", priorities, 0, len(prompts)),
                strict=True,
            )
        ):
            prompt = Prompt(
                **_content(content),
                add_special_tokens=add_special_tokens,
                adapter_id=name,
                **_row_options(scale, priority),
                deadline_ms=deadline_ms,
                stop=tuple(stop),
                params=params,
            )
            check_size(prompt, self.tokenizer, self.info)
            input_ids = tokenise(prompt, self.tokenizer, self.info)
            answer = new_answer(number, prompt, self.tokenizer, begun_s, lambda _ids, logprobs: logprobs)
            answer.num_input_tokens = len(input_ids)
            answers.append(answer)
            messages.append(prompt.message(number, input_ids, answer.deadline_s))
        return _run(self, messages, answers)


def _run(engine: _Engine, messages: Sequence[Generate], answers: Sequence[GrowingAnswer]) -> list[Completion]:
    events: queue.SimpleQueue[list[Tokens | Failed]] = queue.SimpleQueue()
    session = engine.connect(events.put)
    num_left = len(answers)
    try:
        for message in messages:
            session.send(message)
        while num_left:
            for event in events.get():
                answer = answers[event.id]
                if answer.finish_reason:
                    continue
                if isinstance(event, Failed):
                    raise from_code(event.code, event.message)
                answer.add(event)
                if answer.finish_reason:
                    num_left -= 1
                    if not event.finish_reason:
                        session.send(Cancel(event.id))
    finally:
        session.close()
    return [_completion(answer.drain()) for answer in answers]


def _completion(answer: Answer) -> Completion:
    return Completion(
        text=answer.text,
        token_ids=list(answer.token_ids),
        finish_reason=answer.finish_reason,
        num_input_tokens=answer.num_input_tokens,
        adapter_version=answer.adapter_version,
        logprobs=None if answer.logprobs is None else list(answer.logprobs),
    )


def _per_prompt(option: str, values: Sequence[T] | None, default: T, num_prompts: int) -> Sequence[T]:
    if values is None:
        return [default] * num_prompts
    if len(values) != num_prompts:
        raise InvalidArgumentError(f"{num_prompts} prompts, {len(values)} {option}: must be as many")
    return values


def _row_options(scale: float, priority: int) -> dict[str, Any]:
    read = parse({"adapter_scale": scale, "request_priority": priority}, "option")
    return {"adapter_scale": read["adapter_scale"], "priority": read["request_priority"]}


def _params(sampling: Mapping[str, object]) -> SamplingParams:
    known = SamplingParams.__struct_fields__
    unknown = sorted(set(sampling) - set(known))
    if unknown:
        raise InvalidArgumentError(f"unknown option {', '.join(unknown)}; known are {', '.join(known)}")
    given = {name: value for name, value in sampling.items() if value is not None}
    return SamplingParams(**parse(given, "option"))


def _content(prompt: PromptContent) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    if prompt and isinstance(prompt[0], Mapping):
        return {"messages": prompt}
    return {"input_ids": [int(token_id) for token_id in prompt]}  # type: ignore[arg-type]  # ids, by elimination
