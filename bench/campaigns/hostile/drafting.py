"""From a request to what goes over the wire: routes, and damage to tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from . import values
from .case import Asked, Expectation, GrpcCall, HttpCall, Known, Wire
from .request import (
    Request,
    Tensor,
    as_generate,
    as_grpc,
    as_infer_binary,
    as_infer_json,
    ids_tensor,
    text_tensor,
)

Draft = tuple[Wire, tuple[Asked, ...], int | None]
"""A request on the wire, what must come of it, and after how many replies the client leaves."""

FEW = ("max_tokens", "2")
JSON_ROUTES = ("infer_json", "infer_binary", "generate", "generate_stream")
SHAPED_ROUTES = ("infer_json", "infer_binary", "grpc", "grpc_typed")
"""Those that say a tensor's shape; they lead to `llm`."""
ROUTES = (*JSON_ROUTES, "grpc", "grpc_typed", "stream")
FATAL_ROUTES = ("infer_json", "infer_binary")
"""Those whose shapes can end tritonserver."""


def draft(
    draw: random.Random,
    request: Request,
    expects: Expectation,
    known: tuple[Known, ...] = (),
    routes: Sequence[str] = ROUTES,
) -> Draft:
    """Send a request by one of the routes, mostly to the model that the route is for."""
    route = draw.choice(routes)
    can_stray = expects != "answer"
    if route in ("generate_stream", "stream"):
        request.model = "llm" if draw.random() < 0.15 else "llm_stream"
    elif can_stray and draw.random() < 0.05:
        # Triton's `/generate` takes a decoupled model's answer if it is the only one.
        request.model, expects = "llm_stream", expects if route == "generate" else "refusal"
    return render(draw, request, route), (Asked(expects=expects, known=known),), None


def render(draw: random.Random, request: Request, route: str) -> HttpCall | GrpcCall:
    if route == "infer_json":
        return as_infer_json(request)
    if route == "infer_binary":
        return as_infer_binary(request)
    if route in ("generate", "generate_stream"):
        is_nested = draw.random() < 0.3
        return as_generate(request, is_stream=route == "generate_stream", is_nested=is_nested)
    if route == "stream":
        return GrpcCall(messages=(as_grpc(request, request_id="r0"),), is_stream=True)
    return GrpcCall(messages=(as_grpc(request, has_typed=route == "grpc_typed"),))


def short(draw: random.Random, given: list[tuple[str, str]]) -> Request:
    """A request whose answer is short whatever `given` says."""
    if any(name == "max_tokens" for name, _ in given):
        # The end of the model's length is near.
        return Request(tensors=[ids_tensor([7] * (values.MAX_MODEL_LEN - 6))], parameters=given)
    return Request(tensors=[text_tensor([draw.choice((b"Hi", b"The sea is"))])], parameters=[FEW, *given])


def spoil(draw: random.Random, tensor: Tensor, change: str) -> None:
    """Make one property of an input wrong."""
    if change == "datatype":
        tensor.datatype = draw.choice(values.DATATYPES)
    elif change == "shape":
        tensor.shape = draw.choice(values.SHAPES)
        if draw.random() < 0.5:
            # Data to match, where that is possible.
            count = math.prod(tensor.shape)
            tensor.values = tensor.values[:1] * (count if 0 <= count <= 100_000 else 1)
    elif change == "values":
        other: list[Any] = [b"x", 1, -1, 2**31, 2**63, 0]
        tensor.values = draw.choices(other, k=draw.choice((0, 1, 2, 70)))
    elif change == "raw":
        data = tensor.data()
        tensor.raw = draw.choice(
            (
                b"",
                data[:-1],
                data + b"\0",
                b"\xff\xff\xff\xff" + data,
                b"\0" * 4,
                data * 2,
                b"\x7f\xff\xff\xff",
            )
        )
    else:
        tensor.name = draw.choice(
            ("Text_input", "text_input ", "", "INPUT0", "x" * 5000, "text_output", "\u0442ext")
        )
