"""Server-sent events from bytes that are cut anywhere."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manylora_client.sse import EventParser


def _parse(received: list[bytes]) -> tuple[list[str], str]:
    parser = EventParser()
    return [event for part in received for event in parser.feed(part)], parser.rest()


@given(
    texts=st.lists(st.text(), max_size=5),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    cuts=st.lists(st.integers(min_value=0, max_value=400), max_size=20),
)
def test_events_are_the_same_wherever_the_bytes_are_cut(texts: list[str], newline: bytes, cuts: list[int]):
    sent = b"".join(
        b"data: " + json.dumps({"text_output": text}, ensure_ascii=False).encode() + 2 * newline
        for text in texts
    )
    ends = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    events, rest = _parse([sent[a:b] for a, b in itertools.pairwise(ends)])
    assert [json.loads(event)["text_output"] for event in events] == texts
    assert rest == ""


@pytest.mark.parametrize(
    ("received", "events", "rest"),
    [
        (b"data: a\n\n", ["a"], ""),
        (b"data:a\n\n", ["a"], ""),
        (b"data:  a\n\n", [" a"], ""),
        (b"data: a\ndata: b\n\n", ["a\nb"], ""),
        (b": comment\nevent: x\nid: 1\ndata: a\n\n", ["a"], ""),
        (b"\n\n\ndata: a\n\n\n", ["a"], ""),
        (b"data: a\n\ndata: b\n", ["a"], "b"),
        (b"data: a\n\ndata: b", ["a"], "data: b"),
        (b"", [], ""),
    ],
    ids=[
        "plain",
        "no space",
        "one space only is dropped",
        "two lines",
        "other fields",
        "empty lines",
        "line without end of event",
        "half a line",
        "nothing",
    ],
)
def test_event_stream_format(received: bytes, events: list[str], rest: str):
    assert _parse([received]) == (events, rest)
    assert _parse([bytes([byte]) for byte in received]) == (events, rest)


def test_bytes_that_are_no_utf8_are_an_error():
    with pytest.raises(UnicodeDecodeError):
        EventParser().feed(b"data: \xff\n\n")
