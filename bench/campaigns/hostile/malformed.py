"""Damage to what is sent: trees of JSON, plain bytes, and HTTP itself."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .case import HttpBytes, HttpCall, Wire
from .values import JSON_VALUES

_MARK = "@hostile@"


def mutate_json(draw: random.Random, body: bytes) -> bytes:
    """Put a hostile value in the place of some part of a JSON text, double a key, or leave a key out."""
    tree = json.loads(body)
    containers = [(tree, key) for key in tree]
    for container, key in containers:
        inner = container[key]
        keys: Any = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        containers += [(inner, each) for each in keys]
    container, key = draw.choice(containers)
    action = draw.choice(("replace", "replace", "drop", "add", "double"))
    if action == "drop":
        del container[key]
        return json.dumps(tree).encode()
    if action == "double":
        if isinstance(container, list):
            container.append(container[key])
            return json.dumps(tree).encode()
        container[f"{key}{_MARK}"] = container[key]
        return json.dumps(tree).replace(_MARK, "").encode()
    if action == "add" and isinstance(container, dict):
        container[draw.choice(("parameters", "outputs", "id", "x", "", "inputs", "shape", "data"))] = _MARK
    else:
        container[key] = _MARK
    return json.dumps(tree).replace(f'"{_MARK}"', draw.choice(JSON_VALUES)).encode()


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flip bits, cut, double or put in bytes, up to eight times."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        place = draw.randrange(len(found) + 1)
        action = draw.choice(("flip", "flip", "cut", "drop", "put", "double"))
        if action == "flip" and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif action == "cut":
            del found[place:]
        elif action == "drop":
            del found[place : place + draw.randint(1, 8)]
        elif action == "put":
            found[place:place] = draw.randbytes(draw.randint(1, 8))
        else:
            found[place:place] = found[place : place + draw.randint(1, 64)]
    return bytes(found)


def http(draw: random.Random, call: HttpCall) -> Wire:
    """Damage the HTTP around a request that is right."""
    if draw.random() < 0.5:
        return draw.choice(_HEADERS)(draw, call)
    return HttpBytes(sent=draw.choice(_BYTES)(draw, call))


def _with(**headers: str) -> Callable[[random.Random, HttpCall], Wire]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda draw, call: replace(call, headers={**call.headers, **named})


def _at(method: str, path: str) -> Callable[[random.Random, HttpCall], Wire]:
    return lambda draw, call: replace(call, method=method, path=path)


def _gzip(draw: random.Random, call: HttpCall) -> Wire:
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(call.body) + packer.flush()
    return replace(call, body=mutate_bytes(draw, packed), headers={"Content-Encoding": "gzip"})


_HEADERS: tuple[Callable[[random.Random, HttpCall], Wire], ...] = (
    _gzip,
    _with(Content_Encoding="gzip"),
    _with(Content_Encoding="deflate"),
    _with(Content_Encoding="br"),
    _with(Content_Type="text/html"),
    _with(Content_Type="application/octet-stream"),
    _with(Content_Type="multipart/form-data; boundary=x"),
    _with(Content_Type="application/json; charset=utf-16"),
    _with(Accept_Encoding="gzip, deflate, br, *"),
    _with(Accept="application/xml"),
    _with(Inference_Header_Content_Length="-1"),
    _with(Inference_Header_Content_Length="x"),
    _with(Inference_Header_Content_Length="99999999999999999999"),
    _with(Inference_Header_Content_Length="5"),
    _with(X_Long="h" * 4000),
    _with(X_Longer="h" * 100_000),
    _with(X_Longest="h" * 2_000_000),
    _with(Cookie="a=b; " * 1000),
    _with(Expect="100-continue"),
    _with(triton_grpc_error="true"),
    _with(**{f"X_{number}": "v" for number in range(2000)}),
    _at("GET", "/v2/models/llm/generate"),
    _at("PUT", "/v2/models/llm/infer"),
    _at("DELETE", "/v2/models/llm"),
    _at("PATCH", "/v2/models/llm_stream/generate_stream"),
    _at("OPTIONS", "/v2"),
    _at("POST", "/v2/models/nosuch/generate"),
    _at("POST", "/v2/models/llm/versions/1/generate"),
    _at("POST", "/v2/models/llm/versions/7/generate"),
    _at("POST", "/v2/models/llm/versions/-1/infer"),
    _at("POST", "/v2/models/llm/versions/99999999999999999999/infer"),
    _at("POST", "/v2/models//generate"),
    _at("POST", "/v2/models/..%2f..%2fetc/generate"),
    _at("POST", "/v2/models/%00/generate"),
    _at("POST", "/v2/models/llm%00/generate"),
    _at("POST", "/v2/models/" + "m" * 10_000 + "/generate"),
    _at("POST", "/" + "../" * 50 + "etc/passwd"),
    _at("POST", "/v2/models/llm/generate?max_tokens=5&adapter_id=../x"),
    _at("GET", "/v2/models/llm/config"),
    _at("GET", "/v2/models/llm_stream/stats"),
    _at("POST", "/v2/repository/index"),
)

_START = b"POST /v2/models/llm/generate HTTP/1.1\r\nHost: x\r\n"


def _sized(size: str) -> Callable[[random.Random, HttpCall], bytes]:
    return lambda draw, call: _START + f"Content-Length: {size}\r\n\r\n".encode() + call.body


def _chunks(size: str) -> Callable[[random.Random, HttpCall], bytes]:
    head = _START + b"Transfer-Encoding: chunked\r\n\r\n" + size.encode()
    return lambda draw, call: head + b"\r\n" + call.body + b"\r\n0\r\n\r\n"


def _plain(sent: bytes) -> Callable[[random.Random, HttpCall], bytes]:
    return lambda draw, call: sent


def _cut(draw: random.Random, call: HttpCall) -> bytes:
    whole = _START + f"Content-Length: {len(call.body)}\r\n\r\n".encode() + call.body
    return whole[: draw.randrange(len(whole))]


def _damaged(draw: random.Random, call: HttpCall) -> bytes:
    return mutate_bytes(draw, _START) + f"Content-Length: {len(call.body)}\r\n\r\n".encode() + call.body


def _noise(draw: random.Random, call: HttpCall) -> bytes:
    return draw.randbytes(draw.choice((1, 10, 1000, 100_000)))


_BYTES: tuple[Callable[[random.Random, HttpCall], bytes], ...] = (
    _cut,
    _cut,
    _damaged,
    _damaged,
    _noise,
    _sized("1000000"),
    _sized("-1"),
    _sized("x"),
    _sized(""),
    _sized("0"),
    _sized("5"),
    _sized("18446744073709551615"),
    _sized("5\r\nContent-Length: 6"),
    _chunks("5"),
    _chunks("fffffffffffffff"),
    _chunks("-1"),
    _chunks("zz"),
    _plain(b""),
    _plain(b"\r\n\r\n"),
    _plain(b"\0" * 1000),
    _plain(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    _plain(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 200),
    _plain(b"GET / HTTP/9.9\r\n\r\n"),
    _plain(b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n"),
    _plain(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n"),
    _plain(b"GET /v2/health/live HTTP/1.1\r\nbad header\r\n\r\n"),
    _plain(b"GET /v2/health/live HTTP/1.1\r\n: x\r\n\r\n"),
    _plain(b"POST http://other.invalid/v2/models/llm/generate HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"),
    _plain(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 20),
)
