"""Tool calls and reasoning out of answers' texts: each format, and every way to cut a text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from headgate.router.gateway.parsers.choice import (
    begins_in_reasoning,
    splits_reasoning,
    tool_parser,
)
from headgate.router.gateway.parsers.deltas import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Delta,
    ParsedAnswer,
    Parser,
    PlainParser,
    merged,
)
from headgate.router.gateway.parsers.hermes import HermesParser
from headgate.router.gateway.parsers.llama3 import Llama3Parser
from headgate.router.gateway.parsers.mistral import MistralParser
from headgate.router.gateway.parsers.reasoning import ReasoningParser
from headgate.router.gateway.parsers.tool_parser import ToolParser

NAMES = frozenset({"f", "get_weather"})
Calls = list[tuple[str, str]]
MakeParser = Callable[[], Parser]


def parser_of(cls: type[ToolParser], parallel: bool = True) -> ToolParser:
    """With ids that don't depend on chance."""
    parser = cls(NAMES, parallel=parallel)
    numbers = itertools.count()
    parser.new_id = lambda: f"id{next(numbers)}"  # type: ignore[method-assign]
    return parser


def deltas_of(parser: Parser, pieces: Sequence[str], truncated: bool = False) -> list[Delta]:
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return merged(deltas + parser.finish(truncated))


def parse(make: MakeParser, text: str, truncated: bool = False) -> ParsedAnswer:
    """The whole, after trying that it is the same for each cut into two and into characters."""
    whole = deltas_of(make(), [text], truncated)
    cuts = [list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]
    for pieces in cuts:
        assert deltas_of(make(), pieces, truncated) == whole, pieces
    answer = ParsedAnswer()
    answer.add(whole)
    return answer


def calls_of(answer: ParsedAnswer) -> Calls:
    return [(call.name, call.arguments) for call in answer.calls]


HERMES: list[tuple[str, str, Calls]] = [
    ("Hello, world < you  ", "Hello, world < you  ", []),
    (
        '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}]\\""]}}\n</tool_call>',
        "",
        [("f", '{"a": [1, "}]\\""]}')],
    ),
    (
        'Sure.\n<tool_call>{"arguments": {"b": "é"}, "name": "f"}</tool_call>\n'
        '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>\n',
        "Sure.",
        [("f", '{"b": "é"}'), ("get_weather", "{}")],
    ),
    (
        '<tool_call>[{"name": "f"}, {"name": "f", "arguments": "{\\"a\\": 1}"}]</tool_call> ok',
        " ok",
        [("f", "{}"), ("f", '{"a": 1}')],
    ),
    (  # no closing tags
        '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "f", "arguments": null}',
        "",
        [("f", "{}"), ("f", "{}")],
    ),
    (
        '<tool_call>{"name": "f", "x": 1.5, "arguments": {"n": -1e3}, "y": true}</tool_call>',
        "",
        [("f", '{"n": -1e3}')],
    ),
]

LLAMA: list[tuple[str, str, Calls]] = [
    ("Hello {you}", "Hello {you}", []),
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        ' {"type": "function", "name": "f", "parameters": {}}; {"name": "f", "parameters": {}}',
        "",
        [("f", "{}"), ("f", "{}")],
    ),
    ('<|python_tag|>{"name": "f", "parameters": {"a": {}}}', "", [("f", '{"a": {}}')]),
    (
        'Look:\n<|python_tag|>get_weather.call(city="(\\"x", days=[1, 2], metric=True)',
        "Look:",
        [("get_weather", '{"city": "(\\"x", "days": [1, 2], "metric": true}')],
    ),
    ('{"city": "Tokyo", "name": "f"}', '{"city": "Tokyo", "name": "f"}', []),
    (
        ' [get_weather(city="San Francisco, [CA]", days=-2), f()]\n',
        "",
        [("get_weather", '{"city": "San Francisco, [CA]", "days": -2}'), ("f", "{}")],
    ),
    (
        "[f(a={'b': [True, false, None, null]}, c=(1.5, 'é\\n'))] done",
        "done",
        [("f", '{"a": {"b": [true, false, null, null]}, "c": [1.5, "é\\n"]}')],
    ),
    ("Well:<|python_tag|>[f(a=1)]", "Well:", [("f", '{"a": 1}')]),
    ("<|python_tag|>f(a=1); f()", "", [("f", '{"a": 1}'), ("f", "{}")]),
    ('[{"name": "f", "parameters": {}}, {"name": "f"}]', "", [("f", "{}"), ("f", "{}")]),
    ("[f(a=1), f(a=x)]", " f(a=x)]", [("f", '{"a": 1}')]),
    (" [1, 2] and [f]", " [1, 2] and [f]", []),
    ("See [f(a=1)]", "See [f(a=1)]", []),
    ('{"name": "f", "parameters": {}} is it', "is it", [("f", "{}")]),
]

MISTRAL: list[tuple[str, str, Calls]] = [
    ("[TOOL", "[TOOL", []),
    (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]',
        "",
        [("f", '{"a": 1}'), ("f", "{}")],
    ),
    ('Hm. [TOOL_CALLS][{"name": "f", "arguments": {}, "id": "123456789"}]', "Hm.", [("f", "{}")]),
    (
        '[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{}',
        "",
        [("f", '{"a": 1}'), ("get_weather", "{}")],
    ),
    ('[TOOL_CALLS]f{"a": "]"}', "", [("f", '{"a": "]"}')]),
]

BROKEN: list[tuple[type[ToolParser], str]] = [
    (HermesParser, '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f",}</tool_call>'),
    (HermesParser, '<tool_call>{"name": 3}</tool_call>'),
    (HermesParser, '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
    (HermesParser, r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\ud83d\"}"}</tool_call>'),
    (HermesParser, '<tool_call>{"arguments": {}}</tool_call>'),
    (HermesParser, " <tool_call>{f}</tool_call>"),
    (HermesParser, '<tool_call>\n{"name": "f", "arguments": {"a": 1'),
    (HermesParser, "a <tool_call>"),
    (HermesParser, '<tool_call>{"name": "f", "arguments": {"a": "\n"}}</tool_call>'),
    (Llama3Parser, '{"name": "x", "parameters": {}}'),
    (Llama3Parser, '{"name": "f", "parameters": {"a": 1'),
    (Llama3Parser, "<|python_tag|>import os\nprint(os.name)"),
    (Llama3Parser, "<|python_tag|>f.call(open('x'))"),
    (Llama3Parser, "<|python_tag|>f.call(a=open('x'))"),
    (Llama3Parser, r"<|python_tag|>f.call(a='\ud83d')"),
    (Llama3Parser, "<|python_tag|>f.run(a=1)"),
    (Llama3Parser, "[f(1)]"),
    (Llama3Parser, "[f(**{'a': 1})]"),
    (Llama3Parser, "[f(a=nothing)]"),
    (Llama3Parser, "[f(a={1: b'x'})]"),
    (Llama3Parser, "[nobody(a=1)]"),
    (Llama3Parser, "[f(a=1"),
    (Llama3Parser, "["),
    (Llama3Parser, "<|python_tag|>f.call(a="),
    (MistralParser, '[TOOL_CALLS] [{"name": "x"}]'),
    (MistralParser, 'Hi [TOOL_CALLS]nobody[ARGS]{"a": 1}'),
    (MistralParser, '[TOOL_CALLS]f[ARGS]{"a": x}'),
    (MistralParser, "[TOOL_CALLS]" + "x" * 600 + "{}"),
]


@pytest.mark.parametrize(
    ("cls", "text", "content", "calls"),
    [
        (cls, *case)
        for cls, cases in ((HermesParser, HERMES), (Llama3Parser, LLAMA), (MistralParser, MISTRAL))
        for case in cases
    ],
)
def test_calls(cls: type[ToolParser], text: str, content: str, calls: Calls) -> None:
    answer = parse(lambda: parser_of(cls), text)
    assert (answer.content, calls_of(answer)) == (content, calls)


@pytest.mark.parametrize(("cls", "text"), BROKEN)
def test_what_is_no_call_is_text(cls: type[ToolParser], text: str) -> None:
    answer = parse(lambda: parser_of(cls), text)
    assert (answer.content, answer.calls) == (text, [])


def test_a_call_after_a_broken_one_counts() -> None:
    text = '<tool_call>{"name": <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    answer = parse(lambda: parser_of(HermesParser), text)
    assert answer.content == '<tool_call>{"name": '
    assert calls_of(answer) == [("f", "{}")]


def test_a_call_that_the_length_cut_keeps_what_there_is() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1'
    answer = parse(lambda: parser_of(HermesParser), text, truncated=True)
    assert (answer.content, calls_of(answer)) == ("", [("f", '{"a": 1')])
    text = '<tool_call>{"name": "f", "argu'
    assert parse(lambda: parser_of(HermesParser), text, truncated=True).content == text


def test_a_call_may_lack_its_last_brace() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}'
    assert calls_of(parse(lambda: parser_of(HermesParser), text)) == [("f", '{"a": 1}')]


def test_arguments_come_as_they_are_written() -> None:
    parser = parser_of(HermesParser)
    assert parser.feed('x <tool_call>{"name": "f", "arg') == [Content("x")]
    assert parser.feed('uments": {"a"') == [CallStart(0, "id0", "f"), CallArguments(0, '{"a"')]
    assert parser.feed(": [1,") == [CallArguments(0, ": [1,")]
    assert parser.feed("2]}}") == [CallArguments(0, "2]}"), CallEnd(0)]
    assert parser.finish(False) == []


def test_a_call_that_breaks_late_is_told() -> None:
    parser = parser_of(HermesParser)
    parser.feed('<tool_call>{"name": "f", "arguments": {"a": 1')
    broken = parser.feed("]}")
    assert broken[-2:] == [
        CallBroken(0, '<tool_call>{"name": "f", "arguments": {"a": 1'),
        Content("]}"),
    ]


def test_one_call_only() -> None:
    for cls, cases in ((HermesParser, HERMES), (Llama3Parser, LLAMA), (MistralParser, MISTRAL)):
        for text, _, calls in cases:
            answer = parse(lambda cls=cls: parser_of(cls, parallel=False), text)  # type: ignore[misc]
            assert calls_of(answer) == calls[:1]


def test_ids() -> None:
    ids = {HermesParser(NAMES, parallel=True).new_id() for _ in range(100)}
    assert len(ids) == 100 and all(id_.startswith("call_") for id_ in ids)
    id_ = MistralParser(NAMES, parallel=True).new_id()
    assert len(id_) == 9 and id_.isalnum()  # as those models' templates demand


@pytest.mark.parametrize("cls", [HermesParser, Llama3Parser, MistralParser])
def test_calls_are_written_as_they_are_read(cls: type[ToolParser]) -> None:
    text = cls.written.write("f", '{"a": 1}')
    assert calls_of(parse(lambda: parser_of(cls), text)) == [("f", '{"a": 1}')]


REASONING: list[tuple[str, bool, str, str]] = [
    ("<think>\nLet me see.\n</think>\n\nYes.", False, "Let me see.", "Yes."),
    ("Let me see. </thin </think>Yes.", True, "Let me see. </thin", "Yes."),
    (" <think>a</think> b <think>c</think>", False, "a", "b <think>c</think>"),
    ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
    ("<think>without end", False, "without end", ""),
    ("<thi", False, "", "<thi"),
    ("<thi", True, "<thi", ""),
    ("<think></think>Yes.", True, "", "Yes."),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "begun", "reasoning", "content"), REASONING)
def test_reasoning(text: str, begun: bool, reasoning: str, content: str) -> None:
    answer = parse(lambda: ReasoningParser(PlainParser(), begun=begun), text)
    assert (answer.reasoning, answer.content) == (reasoning, content)


def test_calls_after_reasoning() -> None:
    text = '<think><tool_call> or not?</think><tool_call>{"name": "f"}</tool_call>'
    answer = parse(lambda: ReasoningParser(parser_of(HermesParser), begun=False), text)
    assert answer.reasoning == "<tool_call> or not?"
    assert (answer.content, calls_of(answer)) == ("", [("f", "{}")])


def test_choice() -> None:
    assert tool_parser("auto", "x") is HermesParser
    assert tool_parser("auto", "... [TOOL_CALLS] ...") is MistralParser
    assert tool_parser("auto", "<|start_header_id|>ipython") is Llama3Parser
    assert tool_parser("hermes", "[TOOL_CALLS]") is HermesParser
    assert splits_reasoning("auto", "<think>") and not splits_reasoning("auto", "x")
    assert splits_reasoning("deepseek_r1", "x") and not splits_reasoning("off", "<think>")
    assert begins_in_reasoning("auto", "<|a|><think>\n") and not begins_in_reasoning("auto", "a")
    assert begins_in_reasoning("deepseek_r1", "<|a|>")
    assert not begins_in_reasoning("deepseek_r1", "<|a|><think>\n\n</think>\n\n")
