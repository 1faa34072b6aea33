"""Conversations: what is one, what is in it, and what is said of one that is none."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manylora.errors import InvalidArgumentError, ManyloraError, UnsupportedError
from manylora.front_end.chat_messages import read_messages

MAX = 5
USER = '{"role": "user", "content": "u"}'


def read(text: str) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in read_messages(text, MAX)]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("hi", [("user", "hi")]),
        ("", [("user", "")]),
        (' "[quoted]"', [("user", ' "[quoted]"')]),
        ('[{"role": "system", "content": "s"}, ' + USER + "]", [("system", "s"), ("user", "u")]),
        (' \n[\t{"content":"\\u00e9\\n\\ud83d\\ude00" , "role":""}\r]\n', [("", "é\n😀")]),
        ('[{"role": "user", "content": []}]', [("user", "")]),
        (
            '[{"role": "user", "content": [{"type": "text", "text": "a "}, {"text": "b", "type": "text"}]}]',
            [("user", "a b")],
        ),
        ("[" + ", ".join([USER] * MAX) + "]", [("user", "u")] * MAX),
    ],
    ids=["text", "empty", "quoted", "conversation", "spaces and escapes", "no parts", "parts", "most"],
)
def test_text_is_a_message_of_the_user_and_a_list_a_conversation(
    text: str, messages: list[tuple[str, str]]
) -> None:
    assert read(text) == messages


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2] summed?", "message 0 is a number; allowed is an object of role and content"),
        ("[not a list]", "message 0 is null"),
        ("[what?]", 'not JSON at character 1: expected a value, found "w"; send other text as [{"role"'),
        ("[", "not JSON at character 1: expected a value, found the end"),
        ("[[]]", "message 0 is a list"),
        ('["x"]', "message 0 is text"),
        ("{", 'got one JSON object; allowed is a list of messages in [ ]; send other text as [{"role"'),
        (USER, "got one JSON object"),
        ("[]", "empty list"),
        (f"[{USER}] x", 'character 35: expected the end of the text after the list of messages, found "x"'),
        (f"[{USER}", "at character 33: expected , or ], found the end"),
        (f"[{USER},]", 'at character 34: expected a value, found "]"'),
        (f"[{USER} {USER}]", 'at character 34: expected , or ], found "{"'),
        ('[{"role" "user"}]', 'at character 9: expected :, found "\\""'),
        ("[{role: 1}]", 'at character 2: expected ", found "r"'),
        ('[{"role": "us\ner"}]', "at character 13: Invalid control character at"),
        ('[{"role": "user', "at character 10: Unterminated string starting at"),
        ("[{}]", "message 0 lacks the key role; needed are role and content"),
        (f'[{USER}, {{"role": "user"}}]', "message 1 lacks the key content"),
        ('[{"content": "x"}]', "message 0 lacks the key role"),
        ('[{"role": "u", "name": "y"}]', 'message 0 has the unknown key "name"; allowed are role and'),
        ('[{"role": "u", "role": "v"}]', "message 0 has the key role twice"),
        ('[{"role": 1}]', "message 0: role is a number; allowed is text"),
        ('[{"role": null}]', "message 0: role is null"),
        ('[{"role": "u", "content": 3}]', "content is a number; allowed is text and a list of parts"),
        ('[{"role": "u", "content": ["x"]}]', "content: part 0 is text; allowed is an object of type"),
        ('[{"role": "u", "content": [{"type": "text"}]}]', "part 0 lacks the key text"),
        ('[{"role": "u", "content": [{"image_url": 1}]}]', 'part 0 has the unknown key "image_url"'),
        ('[{"role": "u", "content": "\\ud800"}]', "message 0: content has half of a surrogate pair"),
        (
            '[{"role": "u", "content": [' + ", ".join(['{"type": "text", "text": ""}'] * (MAX + 1)) + "]}]",
            "more than 5 parts of contents, which cannot be below max_model_len=5",
        ),
        ("[" + ", ".join([USER] * (MAX + 1)) + "]", "more than 5 messages, which cannot be below max_model"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_conversation_is_said(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match="^chat: .*" + re.escape(reason)):
        read(text)


def test_parts_that_are_no_text_are_not_served() -> None:
    text = '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]'
    with pytest.raises(UnsupportedError, match='part 0 has the type "image_url"; served is text'):
        read(text)


def test_nothing_is_read_after_the_first_thing_that_is_not_served() -> None:
    """Or it could be as long as its client likes."""
    for text in ('[{"tools": ' + "[" * 10**6, "[" + ", ".join([USER] * 10**5)):
        with pytest.raises(InvalidArgumentError, match=r"unknown key|more than 5 messages"):
            read(text)


@settings(max_examples=200, deadline=None)
@given(
    messages=st.lists(
        st.fixed_dictionaries({"role": st.text(max_size=5), "content": st.text(max_size=9)}),
        min_size=1,
        max_size=MAX,
    ),
    escape=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
)
def test_a_conversation_is_read_as_pythons_parser_reads_it(
    messages: list[dict[str, str]], escape: bool, indent: int | None
) -> None:
    text = json.dumps(messages, ensure_ascii=escape, indent=indent)
    assert list(read_messages(text, MAX)) == messages


@settings(max_examples=300, deadline=None)
@given(text=st.text('[]{}",: \\"rolecontentus1n', max_size=40).map("[{".__add__))
def test_what_pythons_parser_refuses_is_refused(text: str) -> None:
    try:
        found = read_messages(text, MAX)
    except ManyloraError:
        return
    assert json.loads(text) == found
