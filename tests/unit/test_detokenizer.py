"""Streamed token texts against the tokenizers library's own decoding of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headgate.router.detokenizer import MAX_HELD_TOKENS, Detokenizer, Pieces, WindowStream
from tests.unit import tokenizers_for_tests as made

BYTE_LEVEL = made.byte_level()
BYTE_FALLBACK = made.byte_fallback()
PIECES = {id(t): Pieces.of(t) for t in (BYTE_LEVEL, BYTE_FALLBACK)}
CONTEXT = 5  # an ordinary token that stands for the prompt


def stream(
    tokenizer: Tokenizer, ids: list[int], skip: bool, context: list[int] | None = None
) -> tuple[list[str], list[str]]:
    pieces = PIECES.get(id(tokenizer)) or Pieces.of(tokenizer)
    detokenizer = Detokenizer(pieces, [CONTEXT] if context is None else context, skip)
    pairs = [detokenizer.push(id_) for id_ in ids]
    pairs.append(detokenizer.flush())
    return [all_ for all_, _ in pairs], [visible for _, visible in pairs]


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids
    return ids


def byte_ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=30))
def test_byte_level_equals_whole_decode_for_any_ids(ids: list[int]) -> None:
    tokens, visible = stream(BYTE_LEVEL, ids, skip=True)
    assert "".join(tokens) == BYTE_LEVEL.decode(ids, skip_special_tokens=False)
    assert "".join(visible) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12), st.integers(0, 60))
def test_byte_level_text_cut_anywhere(text: str, cut: int) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids[:cut]
    tokens, visible = stream(BYTE_LEVEL, ids, skip=False)
    assert "".join(tokens) == "".join(visible) == BYTE_LEVEL.decode(ids)


def test_an_emoji_split_over_tokens_comes_whole_with_its_last_token() -> None:
    ids = BYTE_LEVEL.encode("😀!", add_special_tokens=False).ids
    tokens, _ = stream(BYTE_LEVEL, ids, skip=True)
    assert len(ids) == 3
    assert tokens == ["", "😀", "!", ""]


def test_output_that_ends_inside_a_character_is_flushed() -> None:
    ids = BYTE_LEVEL.encode("a😀", add_special_tokens=False).ids[:-1]
    tokens, visible = stream(BYTE_LEVEL, ids, skip=True)
    assert "".join(visible) == "a\ufffd"
    assert tokens[-1] == "\ufffd"


def test_special_tokens_are_in_the_token_text_only() -> None:
    ids = [*BYTE_LEVEL.encode("he", add_special_tokens=False).ids, *ids_of(BYTE_LEVEL, "<|end|>")]
    tokens, visible = stream(BYTE_LEVEL, ids, skip=True)
    assert "".join(tokens) == "he<|end|>"
    assert "".join(visible) == "he"
    assert "".join(stream(BYTE_LEVEL, ids, skip=False)[1]) == "he<|end|>"


def test_hidden_token_is_not_visible() -> None:
    detokenizer = Detokenizer(PIECES[id(BYTE_LEVEL)], [CONTEXT], False)
    ids = BYTE_LEVEL.encode("he", add_special_tokens=False).ids
    assert detokenizer.push(ids[0], hidden=True) == ("he", "")


def test_byte_fallback_keeps_the_space_of_a_first_word_after_a_prompt() -> None:
    ids = ids_of(BYTE_FALLBACK, "▁hello", "▁world")
    assert "".join(stream(BYTE_FALLBACK, ids, True, ids[1:])[1]) == " hello world"
    special = ids_of(BYTE_FALLBACK, "<s>")
    assert "".join(stream(BYTE_FALLBACK, ids, True, special)[1]) == "hello world"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*range(BYTE_FALLBACK.get_vocab_size())]), max_size=20))
def test_byte_fallback_equals_whole_decode_where_that_is_valid(ids: list[int]) -> None:
    whole = BYTE_FALLBACK.decode([261, *ids], skip_special_tokens=True)
    _, visible = stream(BYTE_FALLBACK, ids, True, [261])
    if "\ufffd" not in whole:
        first = BYTE_FALLBACK.decode([261])
        assert first + "".join(visible) == whole


def test_byte_fallback_delivers_each_character_when_complete() -> None:
    tokens, _ = stream(BYTE_FALLBACK, byte_ids("é😀"), skip=True)
    assert tokens == ["", "é", "", "", "", "😀", ""]


def test_byte_fallback_replaces_invalid_bytes_one_by_one() -> None:
    ids = [3 + 0xFF, *byte_ids("é"), 3 + 0xF0, 3 + 0x9F, *ids_of(BYTE_FALLBACK, "a"), 3 + 0xE2]
    _, visible = stream(BYTE_FALLBACK, ids, skip=True)
    assert "".join(visible) == "\ufffdé\ufffd\ufffda\ufffd"


@pytest.mark.parametrize("tokenizer", [made.metaspace(), made.word_piece()])
def test_other_decoders_equal_whole_decode(tokenizer: Tokenizer) -> None:
    assert isinstance(Pieces.of(tokenizer).new_stream([], False), WindowStream)
    size = tokenizer.get_vocab_size()
    context = [2]
    before = tokenizer.decode(context)
    for seed in range(size * size * 3):
        ids = [(seed // size**k + k) % size for k in range(4)]
        for skip in (False, True):
            _, visible = stream(tokenizer, ids, skip, context)
            whole = tokenizer.decode(context + ids, skip_special_tokens=skip)
            assert before + "".join(visible) == whole


def test_a_window_never_grows_without_bound() -> None:
    tokenizer = made.metaspace()
    text_stream = WindowStream(tokenizer, [2], False)
    for _ in range(100):
        text_stream.push(10_000)  # no such token, no text
        assert len(text_stream._ids) <= 2 * MAX_HELD_TOKENS
    assert text_stream.push(tokenizer.token_to_id("▁world")).strip() == "world"
