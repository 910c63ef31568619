"""Sampling parameters of many rows as columns, and what a sampler has to know of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from headgate.proto.messages import RowSampling
from headgate.shard.sampling.token_bias import TokenBias

IntArray = npt.NDArray[np.int64]

NO_TOKEN = -1  # in place of a token: none could be chosen

# One record per row; `params["temperature"]` is a column. stop_token_ids vary in length and are
# kept beside it.
PARAMS_DTYPE = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("typical_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("watermark_gamma", np.float32),
        ("watermark_delta", np.float32),
        ("seed", np.uint64),
        ("sample_index", np.int64),
        ("max_new_tokens", np.int64),
        ("min_new_tokens", np.int64),
        ("ignore_eos", np.bool_),
        ("logprobs", np.bool_),
        ("top_n_tokens", np.int64),
        ("prompt_logprobs", np.bool_),
        ("prompt_top_n_tokens", np.int64),
        ("pooling", np.int64),
    ]
)


def params_record(sampling: RowSampling) -> tuple[Any, ...]:
    """The row's values in the order of PARAMS_DTYPE."""
    return tuple(getattr(sampling, name) for name in PARAMS_DTYPE.names or ())


def params_array(rows: Sequence[RowSampling]) -> npt.NDArray[np.void]:
    """One record per row."""
    return np.array([params_record(row) for row in rows], dtype=PARAMS_DTYPE)


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """A row's tokens so far."""

    token_ids: npt.NDArray[np.integer]  # prompt, then output
    num_prompt: int


@dataclass(frozen=True, slots=True, eq=False)
class SampledRows:
    """The rows that get a token, apart from their logits. Keys are indices of these rows."""

    params: npt.NDArray[np.void]  # PARAMS_DTYPE[R]
    output_positions: IntArray  # [R]: tokens generated so far, i.e. the position of the next one
    histories: Mapping[int, History] = field(default_factory=dict)  # of rows that need it
    banned: Mapping[int, IntArray] = field(default_factory=dict)  # tokens a row may not take
    # bool[vocab]: tokens that a row's grammar or its request leave. Where all of them are banned,
    # bans don't count.
    allowed: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    biases: Mapping[int, TokenBias] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.params)
