"""llguidance as router and shards use it: one vocabulary and one set of limits for both.

What a router found to compile, the sampling rank compiles too. A grammar is a string here: the JSON
or Lark text that llguidance takes. Importing this module loads llguidance.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Where a row's grammar may end, llguidance makes an error and drops it. With RUST_BACKTRACE set it
# would note the stack each time, which takes longer than the mask. Panics still show theirs.
os.environ.setdefault("RUST_LIB_BACKTRACE", "0")

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# A compilation takes about 2 ms for a thousand symbols, and a symbol is a property, an alternative
# or a piece of one.
MAX_SYMBOLS = 50_000
MAX_ROW_ITEMS = 6_000  # alternatives at one place; an optional property makes four
MAX_LEXER_STATES = 50_000  # of 1 to 2 kB each
_LOUD = 1_000  # characters of an error
# Sets of tokens that a mask takes as a whole where the grammar lets all of them come next, without
# a look at each. llguidance's own are of JSON's strings; these are of words and names, without
# which a regex such as [a-z]+ looks at ten thousand tokens for every mask.
_WORDS = (r"[a-zA-Z0-9]{1,20}", r"[a-z]{1,20}", r" [a-z]{1,20}")


class GrammarError(ValueError):
    """A grammar that cannot be compiled or followed. One sentence, which may quote the grammar."""


def load_tokenizer(
    model_path: str | Path, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer:
    """The vocabulary of the model's tokenizer.json, padded to the `vocab_size` of its logits.

    Takes most of a second in which the interpreter's lock is held. Raises GrammarError for a
    tokenizer that llguidance cannot read.
    """
    eos = [token for token in eos_token_ids if token < vocab_size]
    if not eos:
        raise GrammarError("the model declares no end-of-sequence token, which grammars need")
    try:
        text = (Path(model_path) / "tokenizer.json").read_text(encoding="utf-8")
        slices = [*LLTokenizer.general_slices(), *_WORDS]
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=eos, slices=slices)
    except (OSError, ValueError) as error:
        raise GrammarError(f"the model's tokenizer does not support grammars: {error}") from error


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the grammar's beginning. Raises GrammarError."""
    limits = LLParserLimits(
        max_grammar_size=MAX_SYMBOLS,
        max_items_in_row=MAX_ROW_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(error_of(matcher))
    return matcher


def error_of(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on, for people."""
    text = matcher.get_error().split("\n<")[0].strip()
    if text.startswith("panic"):  # followed by a backtrace
        return "it is too large"
    if text == "NoExtensionBias":
        return "it allows no text at all from here on"
    return text[:_LOUD]
