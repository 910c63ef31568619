"""vLLM's `speculative_config`: how many draft tokens it asks for. Of its methods there is ngram."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headgate.launcher.model_flags import MOST_DRAFT_TOKENS

NGRAM = ("ngram", "[ngram]")  # vLLM takes either, as `method` or as `model`
# How long a run of tokens is looked up, which here follows from the number of draft tokens
# (docs/speculation.md). It changes how often there is a guess, and no answer: taken, of no effect.
LOOKUP_SIZES = ("prompt_lookup_max", "prompt_lookup_min")
_KEYS = frozenset({"method", "model", "num_speculative_tokens", *LOOKUP_SIZES})


def draft_tokens(config: Any, source: str) -> int:
    """The number of draft tokens for `--speculate`, from 1 on.

    source: how the user gave `config`, for messages. Raises ValueError that names the key at fault,
    its value and what is served.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{source} must be an object with keys, not {config!r}")
    given = {key: value for key, value in config.items() if value is not None}
    methods = {key: given[key] for key in ("method", "model") if key in given}
    for key, value in methods.items():
        if value not in NGRAM:
            raise ValueError(f"{source}: `{key}` = {value!r} is not supported, only 'ngram' is")
    if not methods:
        raise ValueError(f"{source}: `method` is missing; 'ngram' is supported")
    for key, value in given.items():
        if key not in _KEYS and value is not False:
            raise ValueError(f"{source}: `{key}` = {value!r} is not supported with 'ngram'")
    number: Any = given.get("num_speculative_tokens")
    if type(number) is not int or not 1 <= number <= MOST_DRAFT_TOKENS:
        raise ValueError(
            f"{source}: `num_speculative_tokens` must be a whole number from 1 to "
            f"{MOST_DRAFT_TOKENS}, not {number!r}"
        )
    return number
