"""Token ids to text, one token at a time: whole characters only, nothing lost, nothing twice.

`Pieces` is the vocabulary seen as bytes, made once per tokenizer; a `TextStream` joins
pieces into text; a `Detokenizer` runs two of them, with and without special tokens.
Stop texts are stop_strings.py's.

Three kinds of tokenizer are told apart by their decoder:
- byte-level BPE (GPT-2, Llama 3, Qwen): every piece is bytes. What is no UTF-8 becomes
  U+FFFD as in the library's own decoding of the whole.
- byte fallback (Llama 2, Mistral, Gemma): pieces are text, or one byte each. Invalid
  bytes become one U+FFFD each. The library takes back whole characters too when bytes
  next to them are invalid; a stream cannot take back what it has sent, so they stay.
- anything else: the library decodes a sliding window that ends in whole characters.
"""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

CONTEXT_TOKENS = 6  # of the prompt, that tell whether a first word begins with a space
MAX_HELD_TOKENS = 8  # a window that does not end in a whole character by then never will
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Pieces:
    """What each id of a vocabulary stands for."""

    texts: list[str | None]  # by id: text of a piece that is whole characters; None: see `bytes`
    bytes: dict[int, bytes]  # pieces that hold part of a character
    special_ids: frozenset[int]
    decode_one: Callable[[int], str]  # a piece by itself, for lists of alternatives
    new_stream: Callable[[Sequence[int], bool], TextStream]  # (end of prompt, skip special)

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> Pieces:
        decoder = json.loads(backend.to_str()).get("decoder") or {}
        added = backend.get_added_tokens_decoder()
        special = frozenset(id_ for id_, token in added.items() if token.special)
        names = _names(backend)
        if _steps(decoder) == ["ByteLevel"]:
            texts, partial = _byte_level_pieces(names)
            one = _decode_one(texts, partial)
            return cls(
                texts, partial, special, one, lambda context, skip: Utf8Stream(texts, partial)
            )
        replacement = _byte_fallback_space(decoder)
        if replacement is not None:
            texts, partial = _byte_fallback_pieces(names, replacement)
            strips = "Strip" in _steps(decoder)

            def fallback(context: Sequence[int], skip: bool) -> TextStream:
                at_start = all(skip and id_ in special for id_ in context)
                return ByteFallbackStream(texts, partial, strip=strips and at_start)

            return cls(texts, partial, special, _decode_one(texts, partial), fallback)
        return cls(
            [],
            {},
            special,
            lambda id_: backend.decode([id_], skip_special_tokens=False),
            lambda context, skip: WindowStream(backend, context, skip),
        )


class Detokenizer:
    """The text of one answer as its tokens come.

    `push` gives two texts: the token's own, special tokens kept, and the visible one, special
    tokens left out where `skip_special` says so. Either is empty while a character is incomplete.
    """

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int], skip_special: bool) -> None:
        self._special_ids = pieces.special_ids
        context = prompt_ids[-CONTEXT_TOKENS:]
        self._skip = skip_special
        self._all = pieces.new_stream(context, False)
        # The two differ from the first special token on, in the prompt's end or the answer.
        apart = skip_special and any(id_ in self._special_ids for id_ in context)
        self._visible = pieces.new_stream(context, True) if apart else self._all

    def push(self, id_: int, hidden: bool = False) -> tuple[str, str]:
        """`hidden`: the token is not part of the visible text though it is not special."""
        if hidden or (self._skip and id_ in self._special_ids):
            if self._visible is self._all:
                self._visible = self._all.fork(self._skip)
            return self._all.push(id_), ""
        text = self._all.push(id_)
        return text, text if self._visible is self._all else self._visible.push(id_)

    def is_special(self, id_: int) -> bool:
        return id_ in self._special_ids

    def flush(self) -> tuple[str, str]:
        """The end: incomplete characters become U+FFFD."""
        text = self._all.flush()
        return text, text if self._visible is self._all else self._visible.flush()


class TextStream:
    """Joins pieces to text. The concatenation of all results is the text of all tokens."""

    def push(self, id_: int) -> str:
        """The whole characters that are complete with this token."""
        raise NotImplementedError

    def flush(self) -> str:
        """What was held back, U+FFFD for what cannot be completed any more."""
        raise NotImplementedError

    def fork(self, skip_special: bool) -> TextStream:
        """A stream that goes on from here by itself."""
        return copy.copy(self)


class Utf8Stream(TextStream):
    """All pieces are bytes of one UTF-8 text."""

    def __init__(self, texts: list[str | None], partial: dict[int, bytes]) -> None:
        self._texts = texts
        self._partial = partial
        self._pending = b""  # up to 3 bytes: the beginning of a character

    def push(self, id_: int) -> str:
        text = self._texts[id_] if id_ < len(self._texts) else ""
        if not self._pending and text is not None:
            return text
        data = self._pending + (self._partial[id_] if text is None else text.encode())
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text


class ByteFallbackStream(TextStream):
    """Pieces are text, or single bytes of characters that the vocabulary lacks."""

    def __init__(self, texts: list[str | None], partial: dict[int, bytes], strip: bool) -> None:
        self._texts = texts
        self._partial = partial
        self._pending = b""
        self._strip = strip  # nothing before this text: its first space is the tokenizer's own

    def push(self, id_: int) -> str:
        text = self._texts[id_] if id_ < len(self._texts) else ""
        if text is None:
            return self._push_byte(self._partial[id_])
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        if not self._pending:
            return text
        return self.flush() + text

    def _push_byte(self, byte: bytes) -> str:
        self._strip = False
        self._pending += byte
        text = ""
        while self._pending:
            try:
                whole, used = codecs.utf_8_decode(self._pending, "strict", False)
            except UnicodeDecodeError as error:
                # Up to `error.start` is well-formed; the byte there begins no character.
                text += self._pending[: error.start].decode() + REPLACEMENT
                self._pending = self._pending[error.start + 1 :]
                continue
            self._pending = self._pending[used:]
            return text + whole
        return text

    def flush(self) -> str:
        text = REPLACEMENT * len(self._pending)
        self._pending = b""
        return text


class WindowStream(TextStream):
    """Decodes a short window of ids without and with the new ones: the difference is new text.

    The window begins early enough for decoders that treat a first word differently.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, context: Sequence[int], skip_special: bool
    ) -> None:
        self._backend = backend
        self._skip = skip_special
        self._ids = list(context)
        self._read = len(self._ids)  # ids of the window whose text is out
        self._before = self._decode(self._ids)

    def push(self, id_: int) -> str:
        self._ids.append(id_)
        text = self._decode(self._ids)
        held = len(self._ids) - self._read
        if text.endswith(REPLACEMENT) and held < MAX_HELD_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._ids)) if len(self._ids) > self._read else ""

    def fork(self, skip_special: bool) -> TextStream:
        twin = copy.copy(self)
        twin._skip = skip_special
        twin._ids = list(self._ids)
        twin._before = twin._decode(twin._ids[: twin._read])
        return twin

    def _advance(self, text: str) -> str:
        new = text[len(self._before) :]
        # Tokens without text stay in the window for a while: the next one may depend on them.
        if new or len(self._ids) - self._read >= MAX_HELD_TOKENS:
            del self._ids[: self._read]
            self._before = self._decode(self._ids)
            self._read = len(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=self._skip)


# ------------------------------------------------------------------ vocabularies


def _names(backend: tokenizers.Tokenizer) -> list[str]:
    """The vocabulary's strings by id; empty where an id has none."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = [""] * (max(vocabulary.values(), default=-1) + 1)
    for name, id_ in vocabulary.items():
        names[id_] = name
    for id_, token in backend.get_added_tokens_decoder().items():
        names[id_] = token.content
    return names


def _steps(decoder: dict[str, Any]) -> list[str]:
    steps = decoder.get("decoders", [decoder])
    return [step.get("type", "") for step in steps]


def _byte_level_pieces(names: list[str]) -> tuple[list[str | None], dict[int, bytes]]:
    to_byte = _byte_level_alphabet()
    texts: list[str | None] = []
    partial: dict[int, bytes] = {}
    for id_, name in enumerate(names):
        # A name with any other character is no byte sequence but an added token's own text.
        known = all(character in to_byte for character in name)
        data = bytes(to_byte[character] for character in name) if known else name.encode()
        _add(texts, partial, id_, data)
    return texts, partial


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes: printable Latin-1 as it is, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_fallback_space(decoder: dict[str, Any]) -> tuple[str, str] | None:
    """(pattern, replacement) of Sequence[Replace, ByteFallback, Fuse, (Strip)]; None: others."""
    steps = decoder.get("decoders", [])
    if _steps(decoder)[:3] != ["Replace", "ByteFallback", "Fuse"]:
        return None
    tail = steps[3:]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    pattern = steps[0].get("pattern", {}).get("String")
    if tail not in ([], [strip]) or pattern is None:
        return None
    return pattern, steps[0].get("content", "")


def _byte_fallback_pieces(
    names: list[str], space: tuple[str, str]
) -> tuple[list[str | None], dict[int, bytes]]:
    texts: list[str | None] = []
    partial: dict[int, bytes] = {}
    for id_, name in enumerate(names):
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            try:
                partial[id_] = bytes.fromhex(name[3:5])
                texts.append(None)
                continue
            except ValueError:
                pass  # not a byte after all
        texts.append(name.replace(*space))
    return texts, partial


def _decode_one(texts: list[str | None], partial: dict[int, bytes]) -> Callable[[int], str]:
    def decode(id_: int) -> str:
        text = texts[id_] if id_ < len(texts) else ""
        return partial[id_].decode("utf-8", "replace") if text is None else text

    return decode


def _add(texts: list[str | None], partial: dict[int, bytes], id_: int, data: bytes) -> None:
    try:
        texts.append(data.decode())
    except UnicodeDecodeError:
        texts.append(None)
        partial[id_] = data
