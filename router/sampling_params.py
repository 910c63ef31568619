"""How to choose tokens and when to stop, as a client asks for it, and the rules each field obeys.

Rules that need the prompt's length or the vocabulary are validation.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from headgate.proto import router_pb2
from headgate.router.errors import ValidationError
from headgate.router.grammar import Grammar

MIN_TEMPERATURE = 1e-6  # anything lower is as good as greedy and would overflow float32 logits
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Mirrors `Parameters` of router.proto. None (or an empty tuple) is the neutral value."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool | None = None
    skip_special_tokens: bool | None = None
    truncate: int | None = None
    logprobs: bool | None = None
    top_n_tokens: int | None = None
    prompt_logprobs: bool | None = None
    prompt_top_n_tokens: int | None = None
    best_of: int | None = None
    watermark: bool | None = None
    n: int | None = None
    grammar: Grammar | None = None

    @classmethod
    def from_proto(cls, message: router_pb2.Parameters) -> SamplingParams:
        given = {field.name: value for field, value in message.ListFields()}
        for name in _REPEATED:
            if name in given:
                given[name] = tuple(given[name])
        if "grammar" in given:
            given["grammar"] = Grammar.from_proto(given["grammar"])
        return cls(**given)

    def to_proto(self) -> router_pb2.Parameters:
        """Raises ValidationError for a value that its field cannot hold."""
        message = router_pb2.Parameters()
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            try:
                if field.name in _REPEATED:
                    getattr(message, field.name).extend(value)
                elif isinstance(value, Grammar):
                    message.grammar.CopyFrom(value.to_proto())
                else:
                    setattr(message, field.name, value)
            except (TypeError, ValueError) as error:
                raise ValidationError(f"`{field.name}`: {error}", field=field.name) from error
        return message

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn rather than the likeliest taken: TGI's rule, min_p added."""
        return bool(
            self.do_sample
            or (self.temperature is not None and self.temperature != 1.0)
            or self.top_k is not None
            or _below_one(self.top_p)
            or _below_one(self.typical_p)
            or bool(self.min_p)
        )

    def check(self, limits: ParameterLimits) -> None:
        """Raises ValidationError for the first rule broken; the order is TGI's."""
        self._check_answers(limits)
        for name, holds, message in _RANGES:
            value = getattr(self, name)
            # NaN fails every comparison, infinity none: neither is a setting.
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValidationError(message, field=name)
        self._check_stop(limits)
        self._check_alternatives(limits)

    def _check_answers(self, limits: ParameterLimits) -> None:
        n, best_of = 1 if self.n is None else self.n, self.best_of
        if best_of is not None and best_of > 1:
            if not self.samples:
                raise ValidationError(
                    "you must use sampling when `best_of` is > 1", field="best_of"
                )
            if limits.max_best_of == 1:
                raise ValidationError(
                    "`best_of` != 1 is not allowed for this endpoint", field="best_of"
                )
        if best_of is not None and not 0 < best_of <= limits.max_best_of:
            raise ValidationError(
                f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {best_of}",
                field="best_of",
            )
        if not 0 < n <= limits.max_answers:
            raise ValidationError(
                f"`n` must be > 0 and <= {limits.max_answers}. Given: {n}", field="n"
            )
        if best_of is not None and best_of < n:
            raise ValidationError(
                f"`best_of` must be >= `n` = {n}. Given: {best_of}", field="best_of"
            )

    def _check_stop(self, limits: ParameterLimits) -> None:
        if len(self.stop) > limits.max_stop_sequences:
            raise ValidationError(
                f"`stop` supports up to {limits.max_stop_sequences} stop sequences. "
                f"Given: {len(self.stop)}",
                field="stop",
            )
        if "" in self.stop:
            raise ValidationError("`stop` sequences cannot be empty", field="stop")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise ValidationError(f"`seed` must be >= 0 and <= {MAX_SEED}", field="seed")

    def _check_alternatives(self, limits: ParameterLimits) -> None:
        for name in ("top_n_tokens", "prompt_top_n_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= limits.max_top_n_tokens:
                raise ValidationError(
                    f"`{name}` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {value}",
                    field=name,
                )


@dataclass(frozen=True, slots=True)
class ParameterLimits:
    """The server's limits that parameters are held against."""

    max_stop_sequences: int
    max_top_n_tokens: int
    max_best_of: int
    max_answers: int


def _below_one(value: float | None) -> bool:
    return value is not None and value < 1.0


_REPEATED = ("stop", "stop_token_ids")

# (field, what must hold, message), in TGI's order; top_p = typical_p = 1 is OpenAI's "off".
_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("temperature", lambda x: x > 0, "`temperature` must be strictly positive"),
    ("repetition_penalty", lambda x: x > 0, "`repetition_penalty` must be strictly positive"),
    (
        "frequency_penalty",
        lambda x: -2 <= x <= 2,
        "`frequency_penalty` must be >= -2.0 and <= 2.0",
    ),
    ("presence_penalty", lambda x: -2 <= x <= 2, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ("top_p", lambda x: 0 < x <= 1, "`top_p` must be > 0.0 and < 1.0"),
    ("typical_p", lambda x: 0 < x <= 1, "`typical_p` must be > 0.0 and < 1.0"),
    ("min_p", lambda x: 0 <= x <= 1, "`min_p` must be >= 0.0 and <= 1.0"),
    ("top_k", lambda x: x > 0, "`top_k` must be strictly positive"),
    ("max_new_tokens", lambda x: x > 0, "`max_new_tokens` must be strictly positive"),
)
