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
MAX_BIAS = 100
MAX_BAD_WORDS = 1024
MAX_LENGTH_PENALTY = 20  # a power of lengths: what a float can hold for any context


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
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias)
    allowed_token_ids: tuple[int, ...] = ()
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: int | None = None  # an EarlyStopping
    bad_words: tuple[str, ...] = ()

    @classmethod
    def from_proto(cls, message: router_pb2.Parameters) -> SamplingParams:
        given = {field.name: value for field, value in message.ListFields()}
        for name in _REPEATED:
            if name in given:
                given[name] = tuple(given[name])
        if "logit_bias" in given:
            given["logit_bias"] = tuple(sorted(given["logit_bias"].items()))
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
                elif field.name == "logit_bias":
                    message.logit_bias.update(dict(value))
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

    @property
    def num_answers(self) -> int:
        """Answers, or beams, that are made at a time."""
        return max(self.n or 1, self.best_of or 1, self.beam_width or 1)

    @property
    def scores_only(self) -> bool:
        """Whether only the prompt's logprobs are wanted."""
        return self.max_new_tokens == 0 and bool(self.prompt_logprobs or self.prompt_top_n_tokens)

    @property
    def searches(self) -> bool:
        """Whether answers are found by beam search."""
        return (self.beam_width or 1) > 1

    def check(self, limits: ParameterLimits) -> None:
        """Raises ValidationError for the first rule broken; the order is TGI's."""
        self._check_answers(limits)
        self._check_beams(limits)
        for name, holds, message in _RANGES:
            value = getattr(self, name)
            if name == "max_new_tokens" and self.scores_only:
                continue
            # NaN fails every comparison, infinity none: neither is a setting.
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValidationError(message, field=name)
        self._check_stop(limits)
        self._check_alternatives(limits)
        if not all(-MAX_BIAS <= value <= MAX_BIAS for _, value in self.logit_bias):
            raise ValidationError(
                f"`logit_bias` values must be >= -{MAX_BIAS} and <= {MAX_BIAS}", field="logit_bias"
            )
        if self.allowed_token_ids and self.grammar is not None:
            raise ValidationError(
                "`allowed_token_ids` cannot be combined with a grammar", field="allowed_token_ids"
            )
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise ValidationError(
                f"`bad_words` supports up to {MAX_BAD_WORDS} words. Given: {len(self.bad_words)}",
                field="bad_words",
            )
        if "" in self.bad_words:
            raise ValidationError("`bad_words` cannot be empty", field="bad_words")

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

    def _check_beams(self, limits: ParameterLimits) -> None:
        width = self.beam_width
        if width is not None and not 0 < width <= limits.max_answers:
            raise ValidationError(
                f"`beam_width` must be > 0 and <= {limits.max_answers}. Given: {width}",
                field="beam_width",
            )
        if width is not None and width < (self.n or 1):
            raise ValidationError(
                f"`beam_width` must be >= `n` = {self.n}. Given: {width}", field="beam_width"
            )
        penalty = self.length_penalty
        if penalty is not None and not -MAX_LENGTH_PENALTY <= penalty <= MAX_LENGTH_PENALTY:
            raise ValidationError(
                f"`length_penalty` must be >= -{MAX_LENGTH_PENALTY} and <= {MAX_LENGTH_PENALTY}",
                field="length_penalty",
            )
        if not self.searches:
            return
        for name, given in self._unfit_for_beams().items():
            if given:
                raise ValidationError(f"`{name}` cannot be combined with beam search", field=name)

    def _unfit_for_beams(self) -> dict[str, bool]:
        """What beam search leaves no place for, and whether it is asked for."""
        return {
            "do_sample": bool(self.do_sample),
            "temperature": self.temperature not in (None, 1.0),
            "top_k": self.top_k is not None,
            "top_p": _below_one(self.top_p),
            "typical_p": _below_one(self.typical_p),
            "min_p": bool(self.min_p),
            "best_of": (self.best_of or 1) > 1,
            "max_new_tokens": self.scores_only,
            "repetition_penalty": self.repetition_penalty not in (None, 1.0),
            "frequency_penalty": bool(self.frequency_penalty),
            "presence_penalty": bool(self.presence_penalty),
            "watermark": bool(self.watermark),
            "grammar": self.grammar is not None,
            "logit_bias": bool(self.logit_bias),
            "allowed_token_ids": bool(self.allowed_token_ids),
            "bad_words": bool(self.bad_words),
            "top_n_tokens": bool(self.top_n_tokens),
            "stop": bool(self.stop),
        }

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


_REPEATED = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")

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
