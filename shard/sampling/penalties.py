"""What a row's tokens so far do to its scores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headgate.shard.sampling.params import History


def needs_history(params: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """bool[R]: rows with a penalty or a watermark. params: PARAMS_DTYPE[R]."""
    return (
        (params["watermark_gamma"] != 0)
        | (params["repetition_penalty"] != 1)
        | (params["frequency_penalty"] != 0)
        | (params["presence_penalty"] != 0)
    )


def apply_penalties(scores: npt.NDArray[np.float32], history: History, params: np.void) -> None:
    """Penalises the history's tokens, in place. scores: float32[vocab]; params: the row's record.

    Repetition (of prompt and output) divides positive and multiplies negative scores, once per
    distinct token. Frequency takes its penalty off for each occurrence in the output, presence once
    for a token that occurs there at all; both count as OpenAI's API does.
    """
    repetition = params["repetition_penalty"]
    if repetition != 1:
        seen = np.unique(history.token_ids)
        old = scores[seen]
        scores[seen] = np.where(old < 0, old * repetition, old / repetition)
    output = history.token_ids[history.num_prompt :]
    if len(output) and (params["frequency_penalty"] or params["presence_penalty"]):
        seen, counts = np.unique(output, return_counts=True)
        penalty = params["frequency_penalty"] * counts.astype(np.float32)
        scores[seen] -= penalty + params["presence_penalty"]
