"""From text to token ids and back: the base model's tokenizer, as front ends use it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from manylora import paths
from manylora.config import resolve_directory
from manylora.errors import InvalidArgumentError, UnsupportedError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_SAMPLES = (
    "The quick brown fox, 3.14 times: don't\n\n\tdef f(x):\n        return x  # ok",
    "déjà vu – 東京タワー – Привет – مرحبا – 👩‍🚀🎉",
)


class Tokenizer:
    """The base model's tokenizer, and the bytes that each token contributes to a text.

    The text of ids is the join of their pieces, read as UTF-8: `first_piece(ids[0]) + piece(ids[1]) + ...`
    over the ids that are not special. The constructor refuses a tokenizer for which this does not hold.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Wrap a transformers tokenizer.

        Raises:
            UnsupportedError: a token's text depends on the tokens after it.
        """
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        decoders = _decoder_types(tokenizer)
        self._is_byte_level = "ByteLevel" in decoders
        self._has_byte_fallback = "ByteFallback" in decoders
        # A token in front absorbs what the decoder does at the start of a text, such as dropping a space.
        self._anchor = self._ids("a")[-1:]
        self._anchor_text = self._decode(self._anchor)
        self._pieces: dict[int, bytes | None] = {}
        self._first_pieces: dict[int, bytes | None] = {}
        self._check_pieces()
        self._prefix, self._num_behind = self._added_tokens()
        self.max_token_chars = max(map(len, tokenizer.get_vocab()))
        """Characters of the longest token."""
        self._special_names = [name for token_id in sorted(self._special) if (name := self.name(token_id))]
        self.names_special: Callable[[str], bool] = functools.lru_cache(maxsize=1024)(self._names_special)
        """Whether a text contains the name of a special token. Cached: some tokenizers have hundreds of
        them."""

    @classmethod
    def load(cls, directory: str) -> Tokenizer:
        """Read the tokenizer of a model directory, never from the network.

        Raises:
            InvalidArgumentError: no such directory, or no tokenizer in it.
            UnsupportedError: the tokenizer's texts cannot be built token by token.
        """
        from transformers import AutoTokenizer

        path = resolve_directory(directory, "base_model")
        try:
            with paths.readable_directory(path) as readable:
                tokenizer = AutoTokenizer.from_pretrained(readable, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InvalidArgumentError(
                f"base_model={directory!r}: no tokenizer to read there: {error}"
            ) from error
        return cls(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds (BOS, where it has one).

        A text that already begins with these, as a chat template writes it, does not get them again.
        """
        if not add_special_tokens:
            return self._ids(text)
        ids = list(self._tokenizer(text)["input_ids"])
        size = len(self._prefix)
        if ids[size : len(ids) - self._num_behind][:size] == self._prefix:
            return ids[size:]
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]], max_chars: int | None = None) -> list[int]:
        """Token ids of a conversation through the chat template, generation prompt added, nothing else.

        Args:
            max_chars: most characters that the template may produce; None: any number.

        Raises:
            UnsupportedError: the base model has no chat template.
            InvalidArgumentError: the template refuses the messages, or produces too much text.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise UnsupportedError(
                "chat=true: the base model has no chat template; send the whole prompt without chat"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InvalidArgumentError(
                f"chat: the base model's chat template refuses the messages: {error}"
            ) from error
        if max_chars is not None and len(text) > max_chars:
            raise InvalidArgumentError(
                f"chat: the prompt has {len(text)} characters when the chat template has rendered it; "
                f"allowed are at most {max_chars}"
            )
        return self._ids(text)

    def _names_special(self, text: str) -> bool:
        return any(name in text for name in self._special_names)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence, without special tokens."""
        pieces = []
        first = True
        for token_id in token_ids:
            piece = self.first_piece(token_id) if first else self.piece(token_id)
            if piece is not None:
                pieces.append(piece)
                first = False
        return b"".join(pieces).decode(errors="replace")

    def name(self, token_id: int) -> str:
        """A token's text by itself: what it adds after others, with U+FFFD for parts of a character, or the
        name of a special token. Empty for an id that the tokenizer does not know."""
        piece = self.piece(token_id)
        if piece is None:
            return str(self._tokenizer.convert_ids_to_tokens(token_id) or "")
        return piece.decode(errors="replace")

    def piece(self, token_id: int) -> bytes | None:
        """The bytes that a token adds after others. None: it is special or unknown, and adds nothing."""
        try:
            return self._pieces[token_id]
        except KeyError:
            return self._pieces.setdefault(token_id, self._make_piece(token_id, self._anchor))

    def first_piece(self, token_id: int) -> bytes | None:
        """The bytes of a token that begins a text."""
        try:
            return self._first_pieces[token_id]
        except KeyError:
            return self._first_pieces.setdefault(token_id, self._make_piece(token_id, []))

    def _make_piece(self, token_id: int, context: list[int]) -> bytes | None:
        token = None if token_id in self._special else self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return None
        if self._is_byte_level:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:  # an added token is its own text
                return str(token).encode()
        text = self._decode([*context, token_id])
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_fallback else None
        if byte and text:
            return bytes([int(byte[1], 16)])
        return text[len(self._anchor_text) if context else 0 :].encode()

    def _check_pieces(self) -> None:
        for sample in _SAMPLES:
            ids = self._ids(sample)
            for cut in (ids, ids[1:], ids[2:]):
                if self.decode(cut) != self._decode(cut):
                    raise UnsupportedError(
                        f"the base model's tokenizer ({type(self._tokenizer).__name__}) is not served: "
                        "its texts are not the join of each token's own text"
                    )

    def _added_tokens(self) -> tuple[list[int], int]:
        """The ids that the tokenizer puts before every text, and how many it puts after it."""
        plain, whole = self._ids(_SAMPLES[0]), list(self._tokenizer(_SAMPLES[0])["input_ids"])
        for size in range(len(whole) - len(plain) + 1):
            if whole[size : size + len(plain)] == plain:
                return whole[:size], len(whole) - size - len(plain)
        return [], 0

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, token_ids: Sequence[int]) -> str:
        # The clean-up that some tokenizers enable changes what was generated: it drops spaces.
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _decoder_types(tokenizer: Any) -> set[str]:
    """Names of the decoding steps of a tokenizer of the `tokenizers` library. Empty for others."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100 on.

    Source: the GPT-2 tokenizer, whose vocabulary files fix this table.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()
