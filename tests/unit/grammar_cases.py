"""JSON Schemas by families, each with instances that are valid and ones that are not.

Instances have their properties in the schema's order, as answers have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    schema: Any
    valid: tuple[Any, ...]
    invalid: tuple[Any, ...]


def _object(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {**schema, "additionalProperties": False, **more}


def types() -> Iterator[Case]:
    samples: dict[str, tuple[Any, ...]] = {
        "string": ("", "a b", 'q"\\\n'),
        "integer": (0, -12, 10**12),
        "number": (1.5, -0.25, 3, 1e20),
        "boolean": (True, False),
        "null": (None,),
        "array": ([], [1, "a", None], [[[]]]),
        "object": ({}, {"a": 1}, {"b": {"c": []}}),
    }
    for name, valid in samples.items():
        others = {key: value[0] for key, value in samples.items() if key != name}
        if name == "number":
            del others["integer"]
        if name == "integer":
            others["number"] = 1.5
        yield Case({"type": name}, valid, tuple(others.values()))
    for one, two in itertools.combinations(("string", "integer", "boolean", "null", "array"), 2):
        valid = (samples[one][0], samples[two][0])
        yield Case({"type": [one, two]}, valid, ({"a": 1},))
    yield Case({}, ("a", 1, None, [], {}), ())
    yield Case({"title": "t", "description": "d", "default": 0, "type": "integer"}, (4,), ("4",))


def constants() -> Iterator[Case]:
    values: tuple[Any, ...] = (
        "a", "", "é", "日本", "😀", 'say "x"', "tab\t", 0, -7, 2.5, True, False, None,
        [], [1, 2], {"a": 1}, {"k": ["v", None]},
    )  # fmt: skip
    for value in values:
        yield Case({"const": value}, (value,), ("other", 99, [value]))
    for count in (1, 2, 5, 40):
        texts = [f"value {index}" for index in range(count)]
        yield Case({"enum": texts}, (texts[0], texts[-1]), ("value", f"value {count}", None))
    yield Case({"enum": [1, "1", None, True]}, (1, "1", None, True), (2, "2", False))
    yield Case({"enum": ["rot", "grün", "blå", "青"]}, ("grün", "青"), ("gr", "grun"))
    yield Case({"type": "string", "enum": ["a", "ab", "abc"]}, ("a", "abc"), ("abcd", ""))


def numbers() -> Iterator[Case]:
    for low, high in ((0, 9), (1, 100), (-5, 5), (-1000, -10), (17, 17), (0, 123456)):
        schema = {"type": "integer", "minimum": low, "maximum": high}
        yield Case(schema, (low, high), (low - 1, high + 1, str(low)))
        schema = {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}
        yield Case(schema, (low, high), (low - 1, high + 1))
    for low in (0, 3, -20):
        yield Case({"type": "integer", "minimum": low}, (low, low + 1000), (low - 1,))
        yield Case({"type": "integer", "maximum": low}, (low, low - 1000), (low + 1,))
        yield Case({"type": "number", "minimum": low}, (low, low + 0.5), (low - 0.5,))
        yield Case({"type": "number", "exclusiveMaximum": low}, (low - 0.5,), (low, low + 0.5))
    yield Case({"type": "number", "minimum": 0, "maximum": 1}, (0, 1, 0.25), (-0.1, 1.01, 2))
    yield Case({"type": "number", "exclusiveMinimum": 0, "maximum": 2.5}, (2.5, 0.1), (2.6, -1))
    for step in (2, 5, 10):
        yield Case({"type": "integer", "multipleOf": step}, (0, step, 7 * step), (step + 1,))


def strings() -> Iterator[Case]:
    for low, high in ((0, 0), (0, 3), (1, 1), (2, 5), (10, 12)):
        schema = {"type": "string", "minLength": low, "maxLength": high}
        invalid = ["x" * (high + 1)] + (["x" * (low - 1)] if low else [])
        yield Case(schema, ("x" * low, "é" * high, "😀" * high), tuple(invalid))
    for length in (1, 4):
        schema = {"type": "string", "minLength": length}
        yield Case(schema, ("日" * length, "y" * 50), ("日" * (length - 1),))


def patterns() -> Iterator[Case]:
    rows: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
        (r"^[a-z]+$", ("a", "abc"), ("", "A", "a1")),
        (r"^[A-Z]{2}-\d{3}$", ("AB-123",), ("AB123", "ab-123", "AB-1234")),
        (r"^(cat|dog)s?$", ("cat", "dogs"), ("cats!", "do")),
        (r"^\+?[0-9]{6,12}$", ("+4912345678", "123456"), ("12345", "+")),
        (r"^#[0-9a-fA-F]{6}$", ("#00ff7F",), ("#00ff7", "00ff7f")),
        (r"^\S+$", ("x", "é!"), ("", "a b")),
        (r"^[^,]*$", ("", "a;b"), ("a,b",)),
        (r"^(a|b)*c?$", ("", "abab", "abc"), ("cc", "d")),
        (r"^v\d+(\.\d+){1,2}$", ("v1.2", "v10.0.3"), ("v1", "v1.2.3.4")),
        (r"^[一-龯]+$", ("日本",), ("nihon", "")),
        (r"^[^\x00-\x1f]{3}$", ("abc", "é日😀"), ("ab", "abcd")),
        (r"abc", ("abc", "xabcx"), ("ab", "ab c")),
        (r"^start", ("start", "starting"), ("a start",)),
        (r"end$", ("end", "the end"), ("ended",)),
        (r"^\d{4}-(0[1-9]|1[0-2])$", ("2024-12",), ("2024-13", "2024-00")),
    )
    for pattern, valid, invalid in rows:
        yield Case({"type": "string", "pattern": pattern}, valid, (*invalid, 5))
    yield Case(
        {"type": "string", "pattern": "^[ab]+$", "minLength": 2, "maxLength": 4},
        ("ab", "abba"), ("a", "ababa", "abc"),
    )  # fmt: skip


def formats() -> Iterator[Case]:
    rows: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "date": (("2024-02-28",), ("2024-2-28", "28.02.2024", "2024-13-01")),
        "time": (("10:20:30Z", "23:59:59.5+01:00"), ("25:00:00Z", "10:20")),
        "date-time": (("2024-02-28T10:20:30Z",), ("2024-02-28", "2024-02-28 noon")),
        "duration": (("P3D", "PT1H30M"), ("3 days", "P")),
        "email": (("a@example.com", "first.last@sub.example.org"), ("a", "@example.com")),
        "hostname": (("example.com", "a-b.c"), ("-a.com", "a b")),
        "ipv4": (("127.0.0.1", "255.255.255.255"), ("256.0.0.1", "1.2.3")),
        "ipv6": (("::1", "2001:db8::ff00:42:8329"), ("1", "::1::2")),
        "uuid": (("123e4567-e89b-12d3-a456-426614174000",), ("123e4567", "not one")),
        "uri": (("https://example.com/a?b=c#d", "urn:isbn:0451450523"), ("no scheme", "")),
    }
    for name, (valid, invalid) in rows.items():
        yield Case({"type": "string", "format": name}, valid, invalid)
        schema = _object({"x": {"type": "string", "format": name}}, "x")
        yield Case(schema, ({"x": valid[0]},), ({"x": invalid[0]}, {}))


def arrays() -> Iterator[Case]:
    integers = {"type": "integer", "minimum": 0, "maximum": 99}
    for low, high in ((0, 0), (0, 2), (1, 1), (2, 4), (3, 3)):
        schema = {"type": "array", "items": integers, "minItems": low, "maxItems": high}
        short = ([1] * (low - 1),) if low else ()
        yield Case(schema, ([1] * low, [7] * high), ([1] * (high + 1), *short, ["1"] * high or 1))
    for low in (1, 3):
        yield Case(
            {"type": "array", "items": integers, "minItems": low}, ([5] * low,), ([5] * (low - 1),)
        )
    for depth in range(1, 5):
        schema: Any = integers
        good: Any = 5
        bad: Any = "5"
        for _ in range(depth):
            schema, good, bad = {"type": "array", "items": schema, "maxItems": 2}, [good], [bad]
        yield Case(schema, (good, []), (bad, 5))
    pair = {"type": "array", "prefixItems": [{"type": "string"}, integers], "items": False}
    yield Case({**pair, "minItems": 2}, (["a", 1],), (["a"], [1, "a"], ["a", 1, 2]))
    yield Case(pair, ([], ["a"], ["a", 1]), (["a", "b"], ["a", 1, 1]))
    yield Case(
        {"type": "array", "prefixItems": [{"const": "x"}], "items": integers, "minItems": 1},
        (["x"], ["x", 1, 2]), ([], ["y"], ["x", "x"]),
    )  # fmt: skip
    yield Case(
        {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
        (["a"], ["b", "b", "a"]), (["c"], [], ["a"] * 4),
    )  # fmt: skip


def objects() -> Iterator[Case]:
    kinds = {"s": {"type": "string", "maxLength": 5}, "i": {"type": "integer"},
             "b": {"type": "boolean"}, "n": {"type": "null"}}  # fmt: skip
    values = {"s": "x", "i": 3, "b": True, "n": None}
    for count in range(1, 5):
        for names in itertools.combinations(kinds, count):
            properties = {name: kinds[name] for name in names}
            whole = {name: values[name] for name in names}
            less = dict(list(whole.items())[1:])
            yield Case(_object(properties, *names), (whole,), (less, {**whole, "z": 1}, []))
            yield Case(_object(properties), (whole, less, {}), ({**whole, "z": 1},))
    base = {"a": {"type": "integer"}}
    yield Case(
        _object(base, "a", additionalProperties={"type": "string", "maxLength": 3}),
        ({"a": 1}, {"a": 1, "z": "abc"}), ({"a": 1, "z": 2}, {"z": "abc"}),
    )  # fmt: skip
    yield Case(_object(base, additionalProperties=True), ({}, {"a": 1, "z": [None]}), ({"a": "1"},))
    yield Case(
        {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}},
        ({}, {"k": 3}, {"a": 1, "b": 2}), ({"k": "3"}, {"k": 10}),
    )  # fmt: skip
    yield Case(
        {"type": "object", "patternProperties": {"^x_[a-z]+$": {"type": "integer"}},
         "additionalProperties": False},
        ({"x_a": 1}, {}), ({"y": 1}, {"x_a": "1"}),
    )  # fmt: skip
    yield Case(
        {"type": "object", "additionalProperties": {"const": 1}, "maxProperties": 1},
        ({}, {"a": 1}), ({"a": 1, "b": 1}, {"a": 2}),
    )  # fmt: skip
    for name in ("naïve", "ключ", "鍵", "a b", 'quo"te', "😀", "a\\b", "x.y", "$id2"):
        yield Case(_object({name: {"type": "integer"}}, name), ({name: 1},), ({"other": 1}, {}))


def combinations() -> Iterator[Case]:
    text, number = {"type": "string", "maxLength": 4}, {"type": "integer"}
    a = _object({"kind": {"const": "a"}, "x": number}, "kind", "x")
    b = _object({"kind": {"const": "b"}, "y": text}, "kind", "y")
    good: tuple[Any, ...] = ({"kind": "a", "x": 1}, {"kind": "b", "y": "z"})
    bad = ({"kind": "a", "y": "z"}, {"kind": "c"}, {"kind": "b"})
    yield Case({"anyOf": [a, b]}, good, bad)
    yield Case({"oneOf": [a, b]}, good, bad)
    yield Case({"type": "array", "items": {"anyOf": [a, b]}, "minItems": 1, "maxItems": 2},
               ([good[0]], list(good)), ([], [bad[1]]))  # fmt: skip
    yield Case({"anyOf": [text, number]}, ("a", 3), (None, "abcde"))
    yield Case({"anyOf": [text, {"type": "null"}]}, ("a", None), (3,))
    yield Case({"oneOf": [text, number]}, ("a", 3), (1.5, True))
    yield Case({"anyOf": [{"const": "on"}, {"const": "off"}, {"type": "boolean"}]},
               ("on", True), ("On", 1))  # fmt: skip
    left = {"type": "object", "properties": {"p": number}, "required": ["p"]}
    right = {"properties": {"q": text}, "required": ["q"]}
    yield Case({"allOf": [left, right]}, ({"p": 1, "q": "x"},), ({"p": 1}, {"q": "x"}))
    yield Case({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, (3, 5), (2, 6))
    yield Case({"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 3}]},
               ("ab", "abc"), ("a", "abcd"))  # fmt: skip
    yield Case({**left, "anyOf": [{"properties": {"p": {"minimum": 10}}}]}, ({"p": 10},),
               ({"p": 9},))  # fmt: skip
    for count in (3, 8):
        options = [_object({f"k{index}": number}, f"k{index}") for index in range(count)]
        yield Case({"anyOf": options}, ({"k0": 1}, {f"k{count - 1}": 2}), ({f"k{count}": 1},))


def references() -> Iterator[Case]:
    point = _object({"x": {"type": "integer"}, "y": {"type": "integer"}}, "x", "y")
    good, bad = {"x": 1, "y": 2}, {"x": 1}
    yield Case({"$defs": {"p": point}, "$ref": "#/$defs/p"}, (good,), (bad,))
    yield Case({"definitions": {"p": point}, "$ref": "#/definitions/p"}, (good,), (bad,))
    yield Case(
        _object({"from": {"$ref": "#/$defs/p"}, "to": {"$ref": "#/$defs/p"}}, "from", "to",
                **{"$defs": {"p": point}}),
        ({"from": good, "to": good},), ({"from": good}, {"from": bad, "to": good}),
    )  # fmt: skip
    yield Case(
        {"type": "array", "items": {"$ref": "#/$defs/p"}, "$defs": {"p": point}, "maxItems": 2},
        ([], [good, good]), ([bad], [good] * 3),
    )  # fmt: skip
    yield Case(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": {"const": 7}},
         "$ref": "#/$defs/a"},
        (7,), (8, "7"),
    )  # fmt: skip
    yield Case(
        {"$defs": {"n~/x": {"type": "boolean"}}, "$ref": "#/$defs/n~0~1x"}, (True, False), (None,)
    )
    yield Case(
        _object({"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}, "a", "b"),
        ({"a": 1, "b": 2},), ({"a": 1, "b": "2"},),
    )  # fmt: skip


def recursion() -> Iterator[Case]:
    # Alternatives that end come often enough that a random walk ends too.
    chain = _object({"v": {"type": "integer"}, "next": {"anyOf": [
        {"type": "null"}, {"$ref": "#/$defs/n"}]}}, "v", "next")  # fmt: skip
    last = {"v": 1, "next": None}
    yield Case({"$defs": {"n": chain}, "$ref": "#/$defs/n"},
               (last, {"v": 2, "next": last}), ({"v": 1}, {"v": 1, "next": 5}))  # fmt: skip
    tree = _object({"name": {"type": "string", "maxLength": 3}, "children": {
        "type": "array", "items": {"$ref": "#"}, "maxItems": 2}}, "name")  # fmt: skip
    leaf = {"name": "a"}
    yield Case(tree, (leaf, {"name": "b", "children": [leaf, leaf]}),
               ({"children": []}, {"name": "b", "children": [5]}))  # fmt: skip
    yield Case({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#"},
                "maxItems": 1}]}, (1, [], [[[3]]]), ("x", ["x"], [1, 2]))  # fmt: skip
    expression = {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/sum"}]}
    total = _object({"op": {"enum": ["+", "-"]}, "left": {"$ref": "#/$defs/e"},
                     "right": {"type": "integer"}}, "op", "left", "right")  # fmt: skip
    yield Case({"$defs": {"e": expression, "sum": total}, "$ref": "#/$defs/e"},
               (3, {"op": "+", "left": {"op": "-", "left": 1, "right": 2}, "right": 3}),
               ({"op": "*", "left": 1, "right": 1}, "3"))  # fmt: skip


def documents() -> Iterator[Case]:
    """As applications have them."""
    name, city = {"type": "string", "maxLength": 8}, {"enum": ["Paris", "Tōkyō", "Bogotá"]}
    weather = _object(
        {
            "city": city,
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "city",
        "unit",
    )
    asked = {"city": "Tōkyō", "unit": "celsius"}
    yield Case(weather, (asked, {**asked, "days": 14}), ({**asked, "days": 15}, {"city": "Paris"}))
    call = _object({"name": {"const": "get_weather"}, "arguments": weather}, "name", "arguments")
    yield Case(
        call,
        ({"name": "get_weather", "arguments": asked},),
        ({"name": "other", "arguments": asked}, {"name": "get_weather"}),
    )
    address = _object({"street": name, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}, "zip")
    person = _object(
        {
            "name": name,
            "born": {"type": "string", "format": "date"},
            "mail": {"anyOf": [{"type": "string", "format": "email"}, {"type": "null"}]},
            "address": {"$ref": "#/$defs/address"},
            "tags": {"type": "array", "items": name, "maxItems": 3},
        },
        "name",
        "address",
        **{"$defs": {"address": address}},
    )
    ann = {"name": "Ann", "born": "1990-01-31", "mail": None, "address": {"zip": "01234"}}
    yield Case(
        person,
        (ann, {**ann, "tags": ["a", "b"]}),
        ({**ann, "address": {"zip": "1234"}}, {**ann, "name": "far too long"}),
    )
    item = _object(
        {
            "sku": {"type": "string", "pattern": "^[A-Z]{3}[0-9]+$"},
            "price": {"type": "number", "minimum": 0},
            "count": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "sku",
        "count",
    )
    order = _object(
        {
            "id": {"type": "string", "format": "uuid"},
            "items": {"type": "array", "items": item, "minItems": 1, "maxItems": 2},
        },
        "items",
    )
    bought = {"items": [{"sku": "ABC1", "price": 9.5, "count": 2}]}
    yield Case(order, (bought,), ({"items": []}, {"items": [{"sku": "abc", "count": 1}]}))
    verdict = _object(
        {
            "reasoning": {"type": "string", "maxLength": 40},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "label": {"enum": ["good", "bad"]},
        },
        "reasoning",
        "score",
        "label",
    )
    good = {"reasoning": "it is", "score": 0.75, "label": "good"}
    yield Case(verdict, (good,), ({**good, "score": 1.5}, {**good, "label": "fair"}))


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    family.__name__: family
    for family in (
        types,
        constants,
        numbers,
        strings,
        patterns,
        formats,
        arrays,
        objects,
        combinations,
        references,
        recursion,
        documents,
    )
}
