"""The process that compiles grammars for a router: see grammar_compiler.py.

Reads `Grammar` messages from standard input, each after its length (4 bytes, little-endian), and
writes one line of JSON for each: {"grammar": ...} or {"problem": ...}. The first line, empty, says
that it is ready. It ends when its input does.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import BinaryIO

from llguidance import LLTokenizer

from headgate.grammar_engine import GrammarError, error_of, load_tokenizer, new_matcher
from headgate.proto import router_pb2
from headgate.router.grammar import Grammar
from headgate.router.grammar_source import to_source

_MAX_MEMORY = 4 << 30  # bytes of address space


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> str:
    """What the shards get. Raises GrammarError."""
    source = to_source(grammar, tokenizer)
    matcher = new_matcher(tokenizer, source)
    matcher.compute_bitmask()
    brace = tokenizer.tokenize_str("{")
    if not matcher.is_error() and matcher.validate_tokens(brace) == len(brace):
        # Too many optional properties are found out where the first of them may come.
        matcher.consume_tokens(brace)
        matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(error_of(matcher))
    return source


def main() -> None:
    settings = json.loads(sys.argv[1])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MAX_MEMORY if hard == resource.RLIM_INFINITY else min(hard, _MAX_MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    tokenizer, problem = None, ""
    try:
        tokenizer = load_tokenizer(
            settings["model_path"], settings["vocab_size"], settings["eos_token_ids"]
        )
    except GrammarError as error:
        problem = str(error)
    _answer("")
    while message := _read(sys.stdin.buffer):
        grammar = Grammar.from_proto(router_pb2.Grammar.FromString(message))
        outcome = {"problem": problem}
        if tokenizer is not None and grammar is not None:
            try:
                outcome = {"grammar": compile_grammar(tokenizer, grammar)}
            except GrammarError as error:
                outcome = {"problem": str(error)}
        _answer(json.dumps(outcome))


def _read(stream: BinaryIO) -> bytes:
    """The next message; empty at the end."""
    size = int.from_bytes(stream.read(4), "little")
    message = stream.read(size)
    return message if len(message) == size else b""


def _answer(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
