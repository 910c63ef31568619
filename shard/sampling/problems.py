"""Sampling parameters that no sampler could work with."""

from __future__ import annotations

from itertools import chain

import numpy as np

from headgate.proto.messages import RowSampling


def sampling_problem(sampling: RowSampling, vocab_size: int) -> str:
    """What would make the sampler fail; the meaning of values is the router's to check."""
    floats = (
        sampling.temperature,
        sampling.top_p,
        sampling.typical_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
        sampling.watermark_delta,
    )
    if not np.isfinite(floats).all():
        return "has a sampling parameter that is not a number"
    if sampling.repetition_penalty <= 0:
        return f"has repetition_penalty {sampling.repetition_penalty}"
    if not 0 <= sampling.watermark_gamma <= 1:
        return f"has watermark_gamma {sampling.watermark_gamma}"
    if not all(np.isfinite(value) for _, value in sampling.logit_bias):
        return "has a logit bias that is not a number"
    told = [id_ for id_, _ in sampling.logit_bias]
    told += [*sampling.allowed_token_ids, *chain.from_iterable(sampling.bad_words)]
    if told and not 0 <= min(told) <= max(told) < vocab_size:
        return "has a bias for a token outside the vocabulary"
    if not all(sampling.bad_words):
        return "has a bad word of no tokens"
    if sampling.grammar and sampling.allowed_token_ids:
        return "has a grammar and a list of allowed tokens"
    if max(sampling.top_n_tokens, sampling.prompt_top_n_tokens) > vocab_size:
        return f"asks for more alternatives than the {vocab_size} tokens there are"
    return ""
