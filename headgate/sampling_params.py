"""vLLM's SamplingParams: its names, defaults and rules, for what the router serves.

A field that is not served raises a ValueError that names it, unless it has its neutral value. The
router's own parameters, with TGI's names, are headgate.router.sampling_params'.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headgate.proto import router_pb2
from headgate.router import sampling_params as router
from headgate.router.grammar import Grammar
from headgate.structured_outputs import GuidedDecodingParams, StructuredOutputsParams

__all__ = ["GuidedDecodingParams", "SamplingParams", "StructuredOutputsParams"]

GREEDY_BELOW = 1e-5  # a temperature that is as good as 0
LOWEST_TEMPERATURE = 0.01  # lower ones are raised to it
MAX_SEED = router.MAX_SEED

# Fields that are not served, with the values that ask for nothing.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "spaces_between_special_tokens": (None, True),
    "flat_logprobs": (None, False),
    "logits_processors": (None, [], ()),
    "logprob_token_ids": (None, [], ()),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "extra_args": (None, {}),
}
_EARLY_STOPPING: dict[bool | str, int] = {
    False: router_pb2.EARLY_STOPPING_HEURISTIC,
    True: router_pb2.EARLY_STOPPING_FIRST,
    "never": router_pb2.EARLY_STOPPING_NEVER,
}


@dataclass(slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises ValueError for a value out of range.

    `stop` and `stop_token_ids` are lists once made. Lengths are in tokens.
    """

    n: int = 1  # answers to each prompt
    best_of: int | None = None  # answers made, of which the n best by mean logprob are given
    presence_penalty: float = 0.0  # [-2, 2]; once per token of the answer
    frequency_penalty: float = 0.0  # [-2, 2]; per occurrence in the answer
    repetition_penalty: float = 1.0  # > 0; over prompt and answer
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 and -1: off
    min_p: float = 0.0  # [0, 1]
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: as many as fit
    min_tokens: int = 0
    logprobs: int | None = None  # alternatives beside the chosen token
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None  # keep the last N of the prompt
    spaces_between_special_tokens: bool = True
    use_beam_search: bool = False  # the n best of best_of (absent: n) beams; temperature 0 or 1
    length_penalty: float = 1.0  # of beams: score = logprob / length ** it
    early_stopping: bool | str = False  # of beams: True, False or "never", as in Transformers
    flat_logprobs: bool = False
    logit_bias: dict[int, float] | None = None  # by token id; values beyond [-100, 100] are cut
    allowed_token_ids: Sequence[int] | None = None  # no other tokens
    bad_words: Sequence[str] | None = None  # texts that the answer may not hold
    logits_processors: Sequence[Any] | None = None
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None
    guided_decoding: StructuredOutputsParams | dict[str, Any] | None = None  # its older name
    logprob_token_ids: Sequence[int] | None = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or ()))
        self.seed = None if self.seed == -1 else self.seed
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                setattr(self, name, 1 if value else None)
        self.check()
        if GREEDY_BELOW <= self.temperature < LOWEST_TEMPERATURE:
            warnings.warn(
                f"temperature = {self.temperature} is raised to {LOWEST_TEMPERATURE}",
                stacklevel=3,
            )
            self.temperature = LOWEST_TEMPERATURE

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    def check(self) -> None:
        """Raises ValueError for the first field that breaks its rule or is not served."""
        for name, neutral in _UNSERVED.items():
            value = getattr(self, name)
            if not any(value is one or value == one for one in neutral):
                raise ValueError(f"`{name}` = {value!r} is not supported")
        for name in ("presence_penalty", "frequency_penalty"):
            self._within(name, -2, 2)
        self._within("repetition_penalty", 0, math.inf, above=True)
        self._within("temperature", 0, math.inf)
        self._within("top_p", 0, 1, above=True)
        self._within("min_p", 0, 1)
        self._whole("n", 1)
        self._whole("best_of", 1)
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"`best_of` must be >= `n` = {self.n}, not {self.best_of}")
        self._whole("top_k", -1)
        self._whole("seed", 0, MAX_SEED)
        self._whole("max_tokens", 1)
        self._whole("min_tokens", 0)
        self._whole("truncate_prompt_tokens", 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"`min_tokens` must be <= `max_tokens` = {self.max_tokens}, not {self.min_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) == -1:
                raise ValueError(f"`{name}` = -1, the whole vocabulary, is not supported")
            self._whole(name, 0)
        self._check_beams()
        self._check_stop()
        self._check_tokens()
        self._grammar()

    def to_router(self) -> router.SamplingParams:
        """The router's parameters for this. Raises ValueError."""
        self.check()
        choosing: dict[str, Any] = {"do_sample": False}
        if self.use_beam_search:
            choosing["beam_width"] = self.best_of or self.n
            choosing["length_penalty"] = self.length_penalty
            choosing["early_stopping"] = _EARLY_STOPPING[self.early_stopping]
        elif not self.greedy:
            choosing = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": self.top_k if self.top_k > 0 else None,
                "top_p": self.top_p,
                "min_p": self.min_p,
                "seed": self.seed,
            }
        return router.SamplingParams(
            **choosing,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            max_new_tokens=self.max_tokens,
            min_new_tokens=self.min_tokens or None,
            ignore_eos=self.ignore_eos or None,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            truncate=self.truncate_prompt_tokens,
            logprobs=self.logprobs is not None,
            top_n_tokens=self.logprobs or None,
            prompt_logprobs=self.prompt_logprobs is not None or None,
            prompt_top_n_tokens=self.prompt_logprobs or None,
            grammar=self._grammar(),
            n=None if self.n == 1 else self.n,
            best_of=None if self.use_beam_search or self.best_of == self.n else self.best_of,
            logit_bias=tuple(
                (int(id_), min(max(float(value), -router.MAX_BIAS), router.MAX_BIAS))
                for id_, value in (self.logit_bias or {}).items()
            ),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=tuple(self.bad_words or ()),
        )

    def _grammar(self) -> Grammar | None:
        given = [
            n for n in ("structured_outputs", "guided_decoding") if getattr(self, n) is not None
        ]
        if not given:
            return None
        if len(given) > 1:
            raise ValueError("`guided_decoding` is `structured_outputs` under its older name")
        try:
            return StructuredOutputsParams.of(getattr(self, given[0])).to_grammar()
        except ValueError as error:
            raise ValueError(f"`{given[0]}`: {error}") from error

    def _check_stop(self) -> None:
        assert self.stop is not None and self.stop_token_ids is not None
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"`stop` must hold strings that are not empty, not {self.stop!r}")
        if self.stop and not self.detokenize:
            raise ValueError("`stop` needs `detokenize` to be True")
        if not all(map(_is_id, self.stop_token_ids)):
            raise ValueError(f"`stop_token_ids` must hold token ids, not {self.stop_token_ids!r}")

    def _check_beams(self) -> None:
        if self.early_stopping not in _EARLY_STOPPING:
            raise ValueError(
                f"`early_stopping` must be True, False or 'never', not {self.early_stopping!r}"
            )
        self._within("length_penalty", -router.MAX_LENGTH_PENALTY, router.MAX_LENGTH_PENALTY)
        if not self.use_beam_search:
            for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != neutral:
                    raise ValueError(f"`{name}` needs `use_beam_search` to be True")
            return
        for name, neutrals in (
            ("temperature", (0, 1)),
            ("top_p", (1,)),
            ("top_k", (0, -1)),
            ("min_p", (0,)),
        ):
            if getattr(self, name) not in neutrals:
                raise ValueError(f"`{name}` cannot be combined with `use_beam_search`")

    def _check_tokens(self) -> None:
        allowed = self.allowed_token_ids
        if allowed is not None and not (allowed and all(map(_is_id, allowed))):
            raise ValueError(f"`allowed_token_ids` must hold token ids, not {allowed!r:.80}")
        words = self.bad_words or ()
        if isinstance(words, str) or not all(isinstance(word, str) and word for word in words):
            raise ValueError(
                f"`bad_words` must hold strings that are not empty, not {self.bad_words!r:.80}"
            )
        try:
            told = {int(id_): float(value) for id_, value in (self.logit_bias or {}).items()}
        except (TypeError, ValueError, AttributeError):
            raise ValueError(
                f"`logit_bias` must be numbers by token id, not {self.logit_bias!r:.80}"
            ) from None
        if not all(_is_id(id_) and not math.isnan(value) for id_, value in told.items()):
            raise ValueError(
                f"`logit_bias` must be numbers by token id, not {self.logit_bias!r:.80}"
            )

    def _within(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if not number or not (low < value if above else low <= value) or value > high:
            rule = f"{'>' if above else '>='} {low}"
            rule += f" and <= {high}" if math.isfinite(high) else ""
            raise ValueError(f"`{name}` must be a number {rule}, not {value!r}")

    def _whole(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if value is None and name not in ("n", "top_k", "min_tokens"):
            return
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            rule = f">= {low}" + ("" if high is None else f" and <= {high}")
            raise ValueError(f"`{name}` must be a whole number {rule}, not {value!r}")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**32
