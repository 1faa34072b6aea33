"""The grammar of hostile requests. A case depends on the seed and its index alone."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from . import malformed, values
from .case import Asked, Case, GrpcCall, HttpCall, Known
from .drafting import (
    FATAL_ROUTES,
    FEW,
    JSON_ROUTES,
    ROUTES,
    SHAPED_ROUTES,
    Draft,
    draft,
    render,
    short,
    spoil,
)
from .request import (
    Request,
    Tensor,
    as_generate,
    as_grpc,
    ids_tensor,
    sampling_tensor,
    text_tensor,
)

MAX_KNOWN_TOKENS = 8
"""Tokens of a known answer."""


class Grammar:
    """Makes cases for a server that has some adapters."""

    def __init__(self, seed: int, prompts: Sequence[tuple[str, str]]) -> None:
        """
        Args:
            prompts: adapter and prompt of each known answer.
        """
        self._seed = seed
        self._prompts = prompts
        self._productions: dict[str, tuple[int, Callable[[random.Random], Draft]]] = {
            "known": (20, self._known),
            "known batch": (3, self._known_batch),
            "bad parameter": (15, self._bad_parameter),
            "edge parameter": (10, self._edge_parameters),
            "unknown parameter": (3, self._unknown_parameter),
            "Triton's parameter": (4, self._triton_parameter),
            "text": (7, self._text),
            "no UTF-8": (3, self._no_utf8),
            "huge text": (1, self._huge_text),
            "ids": (6, self._ids),
            "tensors": (10, self._tensors),
            "inputs": (4, self._inputs),
            "sampling_parameters": (7, self._sampling),
            "adapter name": (7, self._adapter_name),
            "chat": (5, self._chat),
            "mutated JSON": (6, self._mutated_json),
            "mutated bytes": (6, self._mutated_bytes),
            "malformed HTTP": (5, self._malformed),
            "many on a stream": (4, self._many),
            "cancelled": (6, self._cancelled),
        }

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self._productions)

    def case(self, index: int) -> Case:
        """Case number `index`."""
        draw = random.Random(f"{self._seed}:{index}")
        weights = [weight for weight, _ in self._productions.values()]
        (kind,) = draw.choices(self.kinds, weights)
        wire, asked, cancel_after = self._productions[kind][1](draw)
        return Case(index=index, kind=kind, wire=wire, asked=asked, cancel_after=cancel_after)

    # The productions.

    def _known(self, draw: random.Random) -> Draft:
        request, known = self._known_request(draw)
        return draft(draw, request, "answer", (known,))

    def _known_batch(self, draw: random.Random) -> Draft:
        places = [draw.randrange(len(self._prompts)) for _ in range(draw.choice((2, 3, 5, 64)))]
        num_tokens = 1 if len(places) == 64 else draw.randint(1, MAX_KNOWN_TOKENS)
        rows = [{"adapter_id": self._prompts[place][0], "max_tokens": num_tokens} for place in places]
        request = Request(
            tensors=[
                text_tensor([self._prompts[place][1].encode() for place in places]),
                sampling_tensor([json.dumps(row).encode() for row in rows]),
            ]
        )
        known = tuple(Known(place=place, num_tokens=num_tokens) for place in places)
        return draft(draw, request, "answer", known, routes=SHAPED_ROUTES)

    def _bad_parameter(self, draw: random.Random) -> Draft:
        name = draw.choice(list(values.BAD))
        text = draw.choice(values.BAD[name])
        # What gRPC cannot carry as a parameter goes as text, and almost any text may be a stop string.
        routes = JSON_ROUTES if name == "stop" and not text.startswith('"') else ROUTES
        return draft(draw, short(draw, [(name, text)]), "refusal", routes=routes)

    def _edge_parameters(self, draw: random.Random) -> Draft:
        names = draw.sample(list(values.EDGE), draw.choice((1, 1, 2, 3, 6)))
        given = [(name, draw.choice(values.EDGE[name])) for name in names]
        return draft(draw, short(draw, given), "either")

    def _unknown_parameter(self, draw: random.Random) -> Draft:
        text = draw.choice(values.JSON_VALUES[:-1])
        return draft(draw, short(draw, [(draw.choice(values.PARAMETER_NAMES), text)]), "either")

    def _triton_parameter(self, draw: random.Random) -> Draft:
        name = draw.choice(list(values.TRITON_NAMES))
        return draft(draw, short(draw, [(name, draw.choice(values.TRITON_NAMES[name]))]), "either")

    def _text(self, draw: random.Random) -> Draft:
        text = b"".join(draw.choices(values.TEXTS, k=draw.choice((1, 1, 1, 3))))
        return draft(
            draw, Request(tensors=[text_tensor([text])], parameters=[FEW]), "either" if text else "refusal"
        )

    def _no_utf8(self, draw: random.Random) -> Draft:
        text = draw.choice(values.TEXTS) + draw.choice(values.NO_UTF8) + draw.choice(values.TEXTS[:4])
        return draft(draw, Request(tensors=[text_tensor([text])], parameters=[FEW]), "refusal")

    def _huge_text(self, draw: random.Random) -> Draft:
        unit = draw.choice((b"a", b"a ", b"\n", "\U0001f642".encode(), b"<|im_start|>", b"\x00", b"word "))
        text = unit * (draw.choice((10_000, 100_000, 1_000_000, 4_000_000)) // len(unit))
        return draft(draw, Request(tensors=[text_tensor([text])], parameters=[FEW]), "refusal")

    def _ids(self, draw: random.Random) -> Draft:
        is_bad = draw.random() < 0.6
        ids = draw.choice(values.BAD_IDS if is_bad else values.EDGE_IDS)
        request = Request(tensors=[ids_tensor(ids)], parameters=[FEW])
        return draft(draw, request, "refusal" if is_bad else "either")

    def _tensors(self, draw: random.Random) -> Draft:
        request = Request(tensors=[text_tensor([b"Hi"])], parameters=[FEW])
        tensor = request.tensors[0]
        if draw.random() < 0.4:
            tensor = ids_tensor([5, 6])
            request.tensors = [tensor]
        for change in draw.sample(("datatype", "shape", "values", "raw", "name"), draw.choice((1, 1, 2))):
            spoil(draw, tensor, change)
        # Triton 24.10 takes memory for a shape in JSON before it looks at the data, and dies of a large one.
        is_fatal = abs(math.prod(tensor.shape)) > values.MAX_JSON_SIZE or any(
            abs(size) > values.MAX_JSON_SIZE for size in tensor.shape
        )
        routes = [route for route in ROUTES if not (is_fatal and route in FATAL_ROUTES)]
        return draft(draw, request, "either", routes=routes)

    def _inputs(self, draw: random.Random) -> Draft:
        text, ids, sampling = text_tensor([b"Hi"]), ids_tensor([5]), sampling_tensor([b"{}"])
        other = Tensor(
            name=draw.choice(values.PARAMETER_NAMES[:3]) or "x", datatype="INT32", shape=[1, 1], values=[1]
        )
        sets = (
            [],
            [text, ids],
            [sampling],
            [text, text],
            [text, sampling, sampling],
            [text, other],
            [ids, ids],
            [other],
        )
        request = Request(tensors=list(draw.choice(sets)), parameters=[FEW])
        if draw.random() < 0.2:
            # A request that is right but for what it wants back.
            names = draw.choice((["nosuch"], ["text_output", "nosuch"], ["text_output"] * 2, [""]))
            request = Request(tensors=[text], parameters=[FEW], outputs=[{"name": name} for name in names])
            return draft(draw, request, "either", routes=SHAPED_ROUTES)
        return draft(draw, request, "refusal", routes=SHAPED_ROUTES)

    def _sampling(self, draw: random.Random) -> Draft:
        shape = draw.random()
        if shape < 0.4:
            name = draw.choice(list(values.BAD))
            # Only in this tensor a null asks for the default.
            text = draw.choice([text for text in values.BAD[name] if text != "null"])
            texts, expects = [f'{{"{name}": {text}}}'.encode()], "refusal"
        elif shape < 0.75:
            texts, expects = [draw.choice(values.SAMPLING_TEXTS)], "refusal"
        elif shape < 0.9:
            texts, expects = [draw.choice(values.SAMPLING_EDGES)], "either"
        else:
            texts, expects = [b"{}"] * draw.choice((0, 2, 3)), "refusal"
        tensors = [text_tensor([b"Hi"]), sampling_tensor(texts)]
        return draft(draw, Request(tensors=tensors, parameters=[FEW]), expects)  # type: ignore[arg-type]

    def _adapter_name(self, draw: random.Random) -> Draft:
        name = draw.choice(values.ADAPTER_NAMES)
        key = draw.choice(("adapter_id", "lora_name"))
        if draw.random() < 0.3:
            sampling = sampling_tensor([json.dumps({key: name}).encode()])
            request = Request(tensors=[text_tensor([b"Hi"]), sampling], parameters=[FEW])
            return draft(draw, request, "refusal")
        return draft(draw, short(draw, [(key, json.dumps(name))]), "refusal")

    def _chat(self, draw: random.Random) -> Draft:
        is_bad = draw.random() < 0.5
        text = json.dumps(draw.choice(values.CHAT_BAD if is_bad else values.CHAT_EDGE)).encode()
        request = Request(tensors=[text_tensor([text])], parameters=[FEW, ("chat", "true")])
        if draw.random() < 0.1:
            request.tensors, is_bad = [ids_tensor([5])], True
        return draft(draw, request, "refusal" if is_bad else "either")

    def _mutated_json(self, draw: random.Random) -> Draft:
        request, _ = self._known_request(draw)
        call = render(draw, request, draw.choice(("infer_json", "generate", "generate_stream")))
        assert isinstance(call, HttpCall)
        return replace(call, body=malformed.mutate_json(draw, call.body)), (Asked(),), None

    def _mutated_bytes(self, draw: random.Random) -> Draft:
        request, _ = self._known_request(draw)
        wire = render(draw, request, draw.choice(ROUTES))
        if isinstance(wire, GrpcCall):
            messages = tuple(malformed.mutate_bytes(draw, message) for message in wire.messages)
            return replace(wire, messages=messages, is_marked=False), (Asked(),), None
        assert isinstance(wire, HttpCall)
        return replace(wire, body=malformed.mutate_bytes(draw, wire.body)), (Asked(),), None

    def _malformed(self, draw: random.Random) -> Draft:
        request, _ = self._known_request(draw)
        return malformed.http(draw, as_generate(request, is_stream=False, is_nested=False)), (Asked(),), None

    def _many(self, draw: random.Random) -> Draft:
        """Good and bad requests on one gRPC stream, all for one model: Triton 24.10 ends with SIGABRT where
        one stream brings requests for a decoupled model and for another one."""
        messages, asked = [], []
        model = draw.choice(("llm", "llm_stream"))
        for number in range(draw.randint(2, 6)):
            request, known = self._known_request(draw)
            is_bad = draw.random() < 0.4
            if is_bad:
                name = draw.choice(("max_tokens", "seed", "top_p", "chat"))
                request.parameters.append((name, "-7.5"))
            request.model = model
            messages.append(as_grpc(request, request_id=f"r{number}"))
            asked.append(Asked(expects="refusal") if is_bad else Asked(expects="answer", known=(known,)))
        return GrpcCall(messages=tuple(messages), is_stream=True), tuple(asked), None

    def _cancelled(self, draw: random.Random) -> Draft:
        request, _ = self._known_request(draw)
        request.parameters = [pair for pair in request.parameters if pair[0] != "max_tokens"]
        request.parameters += [("max_tokens", "30"), ("ignore_eos", "true")]
        wire = render(draw, request, draw.choice(ROUTES))
        return wire, (Asked(),), draw.choice((0, 0, 1, 2, 5))

    def _known_request(self, draw: random.Random) -> tuple[Request, Known]:
        place, num_tokens = draw.randrange(len(self._prompts)), draw.randint(1, MAX_KNOWN_TOKENS)
        adapter_id, prompt = self._prompts[place]
        parameters = [("max_tokens", str(num_tokens))]
        if adapter_id:
            parameters.append((draw.choice(("adapter_id", "lora_name")), json.dumps(adapter_id)))
        request = Request(tensors=[text_tensor([prompt.encode()])], parameters=parameters)
        return request, Known(place=place, num_tokens=num_tokens)
