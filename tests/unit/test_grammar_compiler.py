"""Grammars on their way into the router: shapes, the wire, and the worker that compiles them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from llguidance import LLMatcher, LLTokenizer

from headgate.grammar_engine import load_tokenizer, new_matcher
from headgate.router import grammar_compiler, grammar_process
from headgate.router.errors import OverloadedError, UnavailableError, ValidationError
from headgate.router.grammar import MAX_CHARACTERS, Grammar, StructuralTag, StructuralTags
from headgate.router.grammar_compiler import GrammarCompiler
from headgate.router.grammar_source import to_source
from tests.checkpoints import IM_END, SPECIAL_TOKENS, VOCAB_SIZE, write_tokenizer

CALL = StructuralTag('<call>{"f":', '{"type":"integer"}', "}</call>")
OTHER = StructuralTag("<call>[", '{"const":true}', "]</call>")
GRAMMARS = [
    Grammar("json_schema", '{"type": "integer"}'),
    Grammar("json_object", True),
    Grammar("regex", "a+"),
    Grammar("lark", 'start: "a"'),
    Grammar("choice", ("a", "é", "")),
    Grammar("structural_tags", StructuralTags((CALL, OTHER), ("<call>",), True)),
    Grammar("structural_tags", StructuralTags((CALL,), separator=", ")),
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> LLTokenizer:
    return load_tokenizer(model_path, VOCAB_SIZE, [IM_END])


@pytest.fixture
def compiler(model_path: str) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(model_path)
    yield compiler
    compiler.close()


async def compiled(compiler: GrammarCompiler, grammar: Grammar) -> str:
    return await compiler.compile(grammar, VOCAB_SIZE, [IM_END])


async def problem(compiler: GrammarCompiler, grammar: Grammar) -> str:
    with pytest.raises(ValidationError) as caught:
        await compiled(compiler, grammar)
    assert caught.value.field == "grammar"
    return caught.value.message


def kill_worker(compiler: GrammarCompiler) -> None:
    process = compiler._process._process
    assert process is not None
    process.kill()
    process.wait()


def accepted(tokenizer: LLTokenizer, grammar: Grammar, text: str) -> bool:
    matcher: LLMatcher = new_matcher(tokenizer, to_source(grammar, tokenizer))
    tokens = tokenizer.tokenize_str(text, parse_special=True)
    return matcher.consume_tokens(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("grammar", GRAMMARS, ids=str)
def test_the_wire(grammar: Grammar) -> None:
    assert Grammar.from_proto(grammar.to_proto()) == grammar
    grammar.check()


# ------------------------------------------------------------------ meanings

MEANINGS: list[tuple[Grammar, tuple[str, ...], tuple[str, ...]]] = [
    (Grammar("json_object", True), ("{}", '{"a": [1]}'), ("[]", "1", "")),
    (Grammar("regex", "a|bc"), ("a", "bc"), ("b", "abc", "")),
    (Grammar("regex", "^ab$"), ("ab",), ("xab", "abx")),
    (Grammar("lark", 'start: "(" start ")" | "x"'), ("x", "((x))"), ("(x", "()")),
    (Grammar("lark", 'root ::= "(" root ")" | [0-9]'), ("7", "((7))"), ("(7", "77")),
    (Grammar("choice", ("yes", "ye", 'q"\\\n', "ñ", "")), ("yes", "ye", 'q"\\\n', "ñ", ""), ("y",)),
    (
        Grammar("structural_tags", StructuralTags((CALL, OTHER), separator="; ")),
        ('<call>{"f":5}</call>', '<call>{"f":5}</call>; <call>[true]</call>'),
        ("", "text", '<call>{"f":5}</call><call>[true]</call>', 'x<call>{"f":5}</call>'),
    ),
    (
        Grammar("structural_tags", StructuralTags((CALL,), single=True)),
        ('<call>{"f":5}</call>',),
        ("", '<call>{"f":5}</call><call>{"f":5}</call>'),
    ),
    (
        Grammar("structural_tags", StructuralTags((CALL, OTHER), ("<call>",))),
        ("", "some <text", 'so: <call>{"f":5}</call> and <call>[true]</call>.'),
        ("so: <call>", 'so: <call>{"f":"5"}</call>', "<call>other</call>"),
    ),
    (
        Grammar("structural_tags", StructuralTags((CALL,), ("<call>",), single=True)),
        ("text", 'so: <call>{"f":5}</call>'),
        ('<call>{"f":5}</call> <call>{"f":5}</call>', '<call>{"f":5}</call> done'),
    ),
    (
        Grammar(
            "structural_tags",
            StructuralTags(
                (StructuralTag(f"{SPECIAL_TOKENS[1]}call ", '{"const": 1}', SPECIAL_TOKENS[0]),),
                (SPECIAL_TOKENS[1],),
            ),
        ),
        (f"text {SPECIAL_TOKENS[1]}call 1{SPECIAL_TOKENS[0]}", "text"),
        (f"text {SPECIAL_TOKENS[1]}", f"{SPECIAL_TOKENS[1]}call 1"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "inside", "outside"), MEANINGS)
def test_what_a_grammar_takes(
    tokenizer: LLTokenizer, grammar: Grammar, inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    for text in inside:
        assert accepted(tokenizer, grammar, text), text
    for text in outside:
        assert not accepted(tokenizer, grammar, text), text


# ------------------------------------------------------------------ the worker


async def test_outcomes_are_kept(compiler: GrammarCompiler) -> None:
    first, again = await asyncio.gather(*(compiled(compiler, GRAMMARS[2]) for _ in range(2)))
    assert first == again and "a+" in first
    kill_worker(compiler)  # it is not asked again
    assert await compiled(compiler, replace(GRAMMARS[2])) == first


MANY = {"type": "object", "properties": {f"p{index}": {} for index in range(1800)}}
BAD = [
    (Grammar("json_schema", json.dumps(MANY)), "items"),
    (Grammar("regex", "a["), "unclosed character class"),
    (Grammar("json_schema", '{"not": {}}'), "not"),
    (Grammar("json_schema", "{"), "not JSON"),
    (Grammar("json_schema", "[" * 9000 + "]" * 9000), "not JSON"),
    (Grammar("json_schema", "[]"), "an object"),
    (Grammar("json_schema", '{"$ref": "#"}'), "no text at all"),
    (Grammar("lark", "start: other"), "other"),
    (Grammar("lark", "= ="), "neither Lark nor GBNF"),
    (Grammar("regex", "(" * 20000 + ")" * 20000), ""),
    (Grammar("choice", ()), "nothing to choose"),
    (Grammar("regex", "a" * (MAX_CHARACTERS + 1)), str(MAX_CHARACTERS)),
    (Grammar("structural_tags", StructuralTags(())), "no structural tag"),
    (Grammar("structural_tags", StructuralTags((CALL,), ("<tool>",))), "<call>"),
]  # fmt: skip


async def test_a_bad_grammar_is_told_why_and_harms_no_other(compiler: GrammarCompiler) -> None:
    for grammar, word in BAD:
        message = await problem(compiler, grammar)
        assert message.startswith("Input validation error: grammar is not valid: ")
        assert word in message
        assert await problem(compiler, grammar) == message  # kept too
    assert await compiled(compiler, GRAMMARS[0])


async def test_a_grammar_that_takes_too_long(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await compiled(compiler, GRAMMARS[0])
    monkeypatch.setattr(grammar_compiler, "COMPILE_SECONDS", 0.0001)
    large = Grammar("choice", tuple(f"value {index}" for index in range(5000)))
    assert "seconds to compile" in await problem(compiler, large)
    monkeypatch.undo()
    assert await compiled(compiler, GRAMMARS[2])  # by another worker


async def test_a_worker_that_dies(compiler: GrammarCompiler) -> None:
    assert await compiled(compiler, GRAMMARS[0])
    kill_worker(compiler)
    assert await compiled(compiler, GRAMMARS[1])


async def test_a_worker_that_is_lost_is_not_the_grammars_fault(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [_dying("os.kill(os.getpid(), 9)"), _dying("os.kill(os.getpid(), 15)")]
    never_there = [(sys.executable, "-c", "pass"), ("/nowhere/at-all",)]
    for command in lost + never_there:
        monkeypatch.setattr(grammar_process, "_COMMAND", command)
        with pytest.raises(UnavailableError) as caught:
            await compiled(compiler, GRAMMARS[0])
        assert (caught.value.http_status, caught.value.retry_after) == (503, 1.0)
    monkeypatch.undo()
    assert await compiled(compiler, GRAMMARS[0])  # nothing was kept


async def test_a_worker_that_brings_itself_down_is(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for grammar, ends in zip(GRAMMARS, ("os.kill(os.getpid(), 11)", "sys.exit(1)"), strict=False):
        monkeypatch.setattr(grammar_process, "_COMMAND", _dying(ends))
        assert "cannot be compiled" in await problem(compiler, grammar)
        monkeypatch.undo()
        assert "cannot be compiled" in await problem(compiler, grammar)  # not tried again


def _dying(ends: str) -> tuple[str, ...]:
    """A worker that ends at its first grammar."""
    code = f"import os, sys; print(flush=True); sys.stdin.buffer.read(4); {ends}"
    return sys.executable, "-c", code


async def test_no_more_wait_than_can_be_served(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_WAITING", 2)
    grammars = [Grammar("regex", "a" * count) for count in range(1, 6)]
    outcomes = await asyncio.gather(
        *(compiled(compiler, grammar) for grammar in grammars), return_exceptions=True
    )
    assert [isinstance(outcome, str) for outcome in outcomes] == [True, True, False, False, False]
    assert all(isinstance(outcome, OverloadedError) for outcome in outcomes[2:])


async def test_a_client_that_leaves_spoils_nothing(compiler: GrammarCompiler) -> None:
    task = asyncio.ensure_future(compiled(compiler, GRAMMARS[0]))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await compiled(compiler, GRAMMARS[0])


async def test_a_model_without_an_end_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(ValidationError, match="end-of-sequence"):
        await compiler.compile(GRAMMARS[0], VOCAB_SIZE, [])
