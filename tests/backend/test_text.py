"""Text and tokens: pieces, incremental text and stop strings, on a real tokenizer and on two small ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manylora.errors import InvalidArgumentError, UnsupportedError
from manylora.front_end.text import Tokenizer
from manylora.front_end.text_stream import StopMatcher, TextStream
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BASE_MODEL = Path(__file__).parents[2] / ".build" / "base_model"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CORPUS = [
    "hello world, hello there",
    "the end of the day",
    "été naïve 東京 🎉",
    "def f(x):\n    return x + 1",
] * 4


@cache
def byte_level() -> PreTrainedTokenizerFast:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.add_tokens(["<東>", "plain added"])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As sentencepiece models come: spaces as ▁, one in front of every text, 256 byte tokens for the rest."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = [*"abcdefghijklmnopqrstuvwxyz,.:()+0123456789=#'TQxrd\n\t-"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*words, *letters, "▁h", "he", "▁▁"]))}
    raw = RawTokenizer(
        models.BPE(vocab, [("▁", "h"), ("h", "e"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def real() -> Any:
    if not (BASE_MODEL / "tokenizer.json").is_file():
        pytest.skip(f"{BASE_MODEL.name} is not prepared: run examples/prepare_base_model.py")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_MODEL)


TOKENIZERS = [byte_level, byte_fallback, real]
every_tokenizer = pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)


@cache
def wrapped(make: Any) -> Tokenizer:
    return Tokenizer(make())


def streamed(tokenizer: Tokenizer, chunks: list[list[int]], **options: Any) -> tuple[str, int, bool]:
    """All deltas joined, ids taken, and whether a stop string ended it."""
    stream = TextStream(tokenizer, **options)
    text, num_taken = "", 0
    for chunk in chunks:
        delta, taken = stream.add(chunk)
        text, num_taken = text + delta, num_taken + taken
        if stream.stopped:
            break
    assert num_taken == stream.num_tokens
    return text + stream.finish(), num_taken, stream.stopped


def plain_decode(make: Any, ids: list[int]) -> str:
    return str(make().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def byte_runs_are_utf8(make: Any, ids: list[int]) -> bool:
    """Whether every run of byte tokens is well-formed; special tokens do not interrupt a run."""
    run = b""
    for token in [*make().convert_ids_to_tokens(ids), "end"]:
        if token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
        elif token not in make().all_special_tokens:
            try:
                run.decode()
            except UnicodeDecodeError:
                return False
            run = b""
    return True


@every_tokenizer
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_of_random_ids_join_to_the_decoded_text(make: Any, data: st.DataObject) -> None:
    size = len(make())
    chunks = data.draw(st.lists(st.lists(st.integers(0, size + 3), max_size=4), max_size=12))
    ids = [i for chunk in chunks for i in chunk]
    text, num_taken, stopped = streamed(wrapped(make), chunks)
    assert (num_taken, stopped) == (len(ids), False)
    assert text == wrapped(make).decode(ids)
    known = [i for i in ids if i < size]
    if make is not byte_fallback or byte_runs_are_utf8(make, known):
        assert text == plain_decode(make, known)


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20), cuts=st.sets(st.integers(0, 60)))
def test_real_text_is_shown_whole_and_never_within_a_character(make: Any, text: str, cuts: set[int]) -> None:
    ids = wrapped(make).encode(text)
    expected = plain_decode(make, ids)
    stream = TextStream(wrapped(make))
    shown = ""
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), None], strict=True):
        shown += stream.add(ids[start:end])[0]
        assert expected.startswith(shown)
    assert shown + stream.finish() == expected


@every_tokenizer
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_where_a_search_of_the_whole_text_finds_them(make: Any, data: st.DataObject) -> None:
    alphabet = st.sampled_from(["a", "b", "he", " ", "é", "🎉", "ab", "\n"])
    ids = wrapped(make).encode("".join(data.draw(st.lists(alphabet, max_size=20))))
    stop = data.draw(
        st.lists(st.lists(alphabet, min_size=1, max_size=3).map("".join), min_size=1, max_size=3)
    )
    min_tokens = data.draw(st.integers(0, 6))

    expected, num_expected, stop_expected = wrapped(make).decode(ids), len(ids), False
    stable = ""
    for n in range(1, len(ids) + 1):
        before, stable = stable, wrapped(make).decode(ids[:n]).rstrip("\ufffd")
        # Matches that the n-th token completes.
        starts = [
            start
            for s in stop
            for start in range(len(stable))
            if stable.startswith(s, start) and start + len(s) > len(before)
        ]
        if starts and n >= min_tokens:
            expected, num_expected, stop_expected = stable[: min(starts)], n, True
            break
    one_by_one = streamed(wrapped(make), [[i] for i in ids], stop=stop, min_tokens=min_tokens)
    at_once = streamed(wrapped(make), [ids], stop=stop, min_tokens=min_tokens)
    assert one_by_one == at_once == (expected, num_expected, stop_expected)


@every_tokenizer
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stop_strings_with_special_tokens_cut_where_a_search_of_the_written_text_finds_them(
    make: Any, data: st.DataObject
) -> None:
    tokenizer = wrapped(make)
    special = sorted(make().all_special_tokens)[:2]
    plain = ["a", "b", " ", "é", "🎉", *(name[:2] for name in special)]
    symbols = st.lists(st.sampled_from([*plain, *special, *special]), max_size=16)
    ids = make()("".join(data.draw(symbols)), add_special_tokens=False)["input_ids"]
    stop = data.draw(
        st.lists(
            st.lists(st.sampled_from([*plain, *special]), min_size=1, max_size=4).map("".join), max_size=3
        )
    )
    min_tokens = data.draw(st.integers(0, 6))

    def written(num_ids: int) -> list[tuple[str, bool]]:
        """Characters as they become certain, and whether each is shown."""
        chars: list[tuple[str, bool]] = []
        for n in range(1, num_ids + 1):
            known = [i for i in ids[:n] if tokenizer.piece(i) is not None]
            shown = tokenizer.decode(known).rstrip("\ufffd")
            chars += [(char, True) for char in shown[sum(is_shown for _, is_shown in chars) :]]
            if tokenizer.piece(ids[n - 1]) is None:
                chars += [(char, False) for char in tokenizer.name(ids[n - 1])]
        return chars

    expected = tokenizer.decode(ids), len(ids), False
    for n in range(1, len(ids) + 1):
        starts = []
        for text in stop:
            in_all = any(name in text for name in make().all_special_tokens)
            now = [c for c in written(n) if in_all or c[1]]
            num_before = len([c for c in written(n - 1) if in_all or c[1]])
            searched = "".join(char for char, _ in now)
            starts += [
                sum(is_shown for _, is_shown in now[:start])
                for start in range(len(searched))
                if searched.startswith(text, start) and start + len(text) > num_before
            ]
        if starts and n >= min_tokens:
            shown = "".join(char for char, is_shown in written(n) if is_shown)
            expected = shown[: min(starts)], n, True
            break
    one_by_one = streamed(tokenizer, [[i] for i in ids], stop=stop, min_tokens=min_tokens)
    at_once = streamed(tokenizer, [ids], stop=stop, min_tokens=min_tokens)
    assert one_by_one == at_once == expected


def test_a_special_token_ends_the_text_and_what_only_begins_like_the_end_is_released() -> None:
    tokenizer = wrapped(byte_level)
    a, b = (tokenizer.encode(char)[0] for char in "ab")
    eos = byte_level().eos_token_id
    assert streamed(tokenizer, [[a, eos, b]], stop=["</s>"]) == ("a", 2, True)
    # Written out by the model, letter by letter, it is the same text.
    letters = [tokenizer.encode(char)[0] for char in "</s>"]
    assert streamed(tokenizer, [[a, *letters, b]], stop=["</s>"]) == ("a", 5, True)
    assert streamed(tokenizer, [[a, eos, b]], stop=["</s>"], min_tokens=3) == ("ab", 3, False)
    stream = TextStream(tokenizer, stop=["a</s>b"])
    assert [stream.add([i])[0] for i in (b, a, eos, eos, a, eos, b)] == ["b", "", "", "a", "", "", ""]
    assert stream.stopped
    # Other stop strings are looked for in the text as it is shown.
    assert streamed(tokenizer, [[a, eos, b]], stop=["ab"]) == ("", 3, True)


@settings(max_examples=200, deadline=None)
@given(
    stop=st.text("ab", min_size=1, max_size=5),
    parts=st.lists(st.text("ab", max_size=4), max_size=8),
)
def test_stop_matcher_agrees_with_find(stop: str, parts: list[str]) -> None:
    matcher = StopMatcher(stop)
    seen = ""
    for part in parts:
        ends = [
            end for end in range(len(seen) + 1, len(seen + part) + 1) if (seen + part)[:end].endswith(stop)
        ]
        expected = ends[0] - len(stop) - len(seen) if ends else None
        assert matcher.feed(part) == expected
        seen += part
        borders = [n for n in range(len(stop)) if seen.endswith(stop[:n])]
        assert matcher.num_matched == max(borders)


def test_text_that_may_become_a_stop_string_is_held_back_and_released() -> None:
    tokenizer = wrapped(byte_fallback)
    a, b, c = (tokenizer.encode(char)[-1] for char in "abc")
    stream = TextStream(tokenizer, stop=["abc"])
    assert stream.add([a]) == ("", 1)
    assert stream.add([b]) == ("", 1)
    assert stream.add([b]) == ("abb", 1)
    assert stream.add([a]) == ("", 1)
    assert stream.finish() == "a"
    assert streamed(tokenizer, [[b, a, b, c, b]], stop=["abc"]) == ("b", 4, True)


def test_an_emoji_over_several_tokens_appears_at_once() -> None:
    tokenizer = wrapped(byte_fallback)
    ids = tokenizer.encode("a🎉b")
    stream = TextStream(tokenizer)
    deltas = [stream.add([i])[0] for i in ids]
    assert [d for d in deltas if d] == ["a", "🎉", "b"]


def test_leading_space_is_dropped_at_the_start_and_kept_after_a_prompt() -> None:
    tokenizer = wrapped(byte_fallback)
    ids = tokenizer.encode("he")
    assert streamed(tokenizer, [ids])[0] == "he"
    assert streamed(tokenizer, [ids], continues=True)[0] == " he"


def test_special_tokens_show_nothing_and_do_not_split_a_character() -> None:
    tokenizer = wrapped(byte_level)
    first, *rest = tokenizer.encode("\N{SNOWMAN}")
    assert rest
    eos = byte_level().eos_token_id
    assert streamed(tokenizer, [[first], [eos], rest, [eos]])[0] == "\N{SNOWMAN}"


@pytest.mark.parametrize(
    ("make", "text", "names"),
    [
        (byte_level, "hello there", ["hello", " there"]),
        (byte_level, "\N{SNOWMAN}", ["\ufffd"] * 3),
        (byte_fallback, "a he", [" ", "a", " h", "e"]),
        (byte_fallback, "é", [" ", "\ufffd", "\ufffd"]),
    ],
    ids=["words", "parts of a character", "spaces", "byte tokens"],
)
def test_a_token_by_itself_has_its_text(make: Any, text: str, names: list[str]) -> None:
    tokenizer = wrapped(make)
    found = [tokenizer.name(i) for i in make()(text, add_special_tokens=False)["input_ids"]]
    assert found == names


@every_tokenizer
def test_special_tokens_are_called_by_their_name_and_unknown_ones_nothing(make: Any) -> None:
    eos = make().eos_token_id
    assert wrapped(make).name(eos) == make().eos_token != ""
    assert wrapped(make).name(10**6) == ""


def test_a_tokenizer_whose_tokens_depend_on_later_ones_is_refused() -> None:
    vocab = {
        token: i for i, token in enumerate(["<unk>", "a", "a</w>", "o", "f", "f</w>", "b", "T", "h", "e</w>"])
    }
    raw = RawTokenizer(models.BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.BPEDecoder("</w>")
    with pytest.raises(UnsupportedError, match="is not served"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))


def test_chat_renders_the_template_with_its_generation_prompt() -> None:
    tokenizer = wrapped(byte_level)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert byte_level().decode(ids) == "<s>user: hello\n<s>assistant: "
    assert ids.count(byte_level().bos_token_id) == 2


def test_chat_refusals() -> None:
    with pytest.raises(InvalidArgumentError, match="no such role"):
        wrapped(byte_level).encode_chat([{"role": "bad", "content": ""}])
    with pytest.raises(UnsupportedError, match="no chat template"):
        wrapped(byte_fallback).encode_chat([{"role": "user", "content": ""}])


def test_a_chat_of_which_the_template_makes_too_much_is_refused() -> None:
    messages = [{"role": "user", "content": "hello"}]
    text = "<s>user: hello\n<s>assistant: "
    assert wrapped(byte_level).encode_chat(messages, len(text)) == wrapped(byte_level).encode_chat(messages)
    with pytest.raises(InvalidArgumentError, match=f"has {len(text)} characters .* at most {len(text) - 1}"):
        wrapped(byte_level).encode_chat(messages, len(text) - 1)


@cache
def with_bos_and_eos() -> PreTrainedTokenizerFast:
    """It begins each text with BOS and ends it with EOS."""
    raw = RawTokenizer.from_str(byte_level().backend_tokenizer.to_str())
    ids = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def test_a_text_gets_one_bos() -> None:
    tokenizer = wrapped(with_bos_and_eos)
    bos, eos = with_bos_and_eos().bos_token_id, with_bos_and_eos().eos_token_id
    (*hello,) = tokenizer.encode("hello", add_special_tokens=False)
    assert not {bos, eos} & {*hello}
    assert tokenizer.encode("hello") == [bos, *hello, eos]
    assert tokenizer.encode("<s>hello") == [bos, *hello, eos]
    assert tokenizer.encode("<s><s>hello") == [bos, bos, *hello, eos]
    assert tokenizer.encode("hello<s>") == [bos, *hello, bos, eos]
    assert tokenizer.encode("<s>hello", add_special_tokens=False) == [bos, *hello]
    messages = [{"role": "user", "content": "hello"}]
    rendered = with_bos_and_eos().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # Its own two, one for each turn, and none besides.
    assert tokenizer.encode_chat(messages).count(bos) == tokenizer.encode(rendered).count(bos) == 2
    assert tokenizer.encode(rendered)[:-1] == tokenizer.encode_chat(messages)


@cache
def with_template(template: str) -> Tokenizer:
    """One that names no token BOS and writes each text as the template does."""
    raw = RawTokenizer.from_str(byte_level().backend_tokenizer.to_str())
    ids = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("</s> <s> $A", "hello", "</s><s>hello"),
        ("</s> <s> $A", "</s><s>hello", "</s><s>hello"),
        ("</s> <s> $A", "</s><s>", "</s><s>"),
        ("</s> <s> $A", "</s><s></s><s>hello", "</s><s></s><s>hello"),
        ("</s> <s> $A", "<s>hello", "</s><s><s>hello"),
        ("</s> <s> $A", "</s>hello", "</s><s></s>hello"),
        ("</s> <s> $A", "", "</s><s>"),
        ("<s> $A <s>", "", "<s><s>"),
        ("<s> $A <s>", "<s>", "<s><s>"),
        ("<s> $A <s>", "hello", "<s>hello<s>"),
        ("$A </s>", "</s>hello", "</s>hello</s>"),
        ("$A", "<s><s>hello", "<s><s>hello"),
    ],
)
def test_a_text_gets_what_the_tokenizer_puts_in_front_once(template: str, text: str, expected: str) -> None:
    tokenizer = with_template(template)
    assert tokenizer.encode(text) == tokenizer.encode(expected, add_special_tokens=False)


def test_a_text_that_begins_with_two_bos_keeps_both_where_none_is_added() -> None:
    bos = byte_level().bos_token_id
    assert wrapped(byte_level).encode("<s><s>hello")[:3].count(bos) == 2


def test_load_refuses_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no tokenizer to read"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(InvalidArgumentError, match="no such directory"):
        Tokenizer.load(str(tmp_path / "absent"))


def test_load_reads_what_was_saved(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("hello 🎉")) == "hello 🎉"
    assert tokenizer.max_token_chars >= len("plain added")
