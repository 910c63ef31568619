"""What an answer must be, as a client says it: a mirror of `Grammar` in router.proto.

Knows shapes and sizes only; whether a grammar can be followed is grammar_compiler.py's to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headgate.proto import router_pb2
from headgate.router.errors import ValidationError

MAX_CHARACTERS = 131_072  # of a grammar's texts together: what compiles in about a second


@dataclass(frozen=True, slots=True)
class StructuralTag:
    """JSON between two fixed texts; a special token's name in them stands for the token."""

    begin: str
    json_schema: str  # JSON text
    end: str


@dataclass(frozen=True, slots=True)
class StructuralTags:
    """Tags, with free text around them where there are triggers."""

    tags: tuple[StructuralTag, ...]
    triggers: tuple[str, ...] = ()  # texts that begin a tag wherever they come; none: no free text
    single: bool = False  # one tag at most, and the answer ends with it
    separator: str = ""  # between tags that follow each other, without triggers


@dataclass(frozen=True, slots=True)
class Grammar:
    """`value` by `kind`: JSON text (json_schema), True (json_object), text (regex, lark), a tuple
    of texts (choice), StructuralTags (structural_tags)."""

    kind: str
    value: str | bool | tuple[str, ...] | StructuralTags

    @classmethod
    def from_proto(cls, message: router_pb2.Grammar) -> Grammar | None:
        """None where the message says nothing."""
        kind = message.WhichOneof("kind")
        if kind is None or (kind == "json_object" and not message.json_object):
            return None
        if kind == "choice":
            return cls(kind, tuple(message.choice.texts))
        if kind == "structural_tags":
            return cls(kind, _tags_from_proto(message.structural_tags))
        return cls(kind, getattr(message, kind))

    def to_proto(self) -> router_pb2.Grammar:
        message = router_pb2.Grammar()
        if isinstance(self.value, StructuralTags):
            value = self.value
            message.structural_tags.CopyFrom(
                router_pb2.Grammar.StructuralTags(
                    tags=[
                        router_pb2.Grammar.StructuralTags.Tag(
                            begin=tag.begin, json_schema=tag.json_schema, end=tag.end
                        )
                        for tag in value.tags
                    ],
                    triggers=value.triggers,
                    single=value.single,
                    separator=value.separator,
                )
            )
        elif isinstance(self.value, tuple):
            message.choice.texts.extend(self.value)
        else:
            setattr(message, self.kind, self.value)
        return message

    def texts(self) -> Sequence[str]:
        """Every text in it."""
        if isinstance(self.value, StructuralTags):
            tags = [
                text for tag in self.value.tags for text in (tag.begin, tag.json_schema, tag.end)
            ]
            return [*tags, *self.value.triggers, self.value.separator]
        if isinstance(self.value, tuple):
            return self.value
        return [self.value] if isinstance(self.value, str) else []

    def check(self) -> None:
        """Raises ValidationError for a shape that no grammar has."""
        size = sum(map(len, self.texts()))
        if size > MAX_CHARACTERS:
            raise _invalid(f"it has {size} characters, and {MAX_CHARACTERS} are the most")
        if self.kind == "choice" and not any(self.texts()):
            raise _invalid("there is nothing to choose from")
        if isinstance(self.value, StructuralTags):
            self._check_tags(self.value)

    def _check_tags(self, value: StructuralTags) -> None:
        if not value.tags:
            raise _invalid("there is no structural tag")
        if "" in value.triggers:
            raise _invalid("a trigger is empty")
        if value.triggers and value.separator:
            raise _invalid("a separator is for tags without triggers")
        for tag in value.tags:
            if value.triggers and not tag.begin.startswith(value.triggers):
                raise _invalid(f"no trigger begins the tag {tag.begin[:64]!r}")

    def __str__(self) -> str:
        """Short, for logs."""
        return f"{self.kind} of {sum(map(len, self.texts()))} characters"


def _tags_from_proto(message: router_pb2.Grammar.StructuralTags) -> StructuralTags:
    return StructuralTags(
        tags=tuple(StructuralTag(tag.begin, tag.json_schema, tag.end) for tag in message.tags),
        triggers=tuple(message.triggers),
        single=message.single,
        separator=message.separator,
    )


def _invalid(reason: str) -> ValidationError:
    return ValidationError(f"grammar is not valid: {reason}", field="grammar")
