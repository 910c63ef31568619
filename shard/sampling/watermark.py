"""A mark that a detector finds in the text: some tokens, chosen by the one before, are favoured.

The scheme is that of Kirchenbauer et al., "A watermark for large language models", 2023, with TGI's
constants: whoever knows gamma counts how many tokens are in the list that their predecessor gives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_HASH_KEY = 15_485_863  # the millionth prime; with the last token it seeds the permutation


def favoured_tokens(last_token: int, vocab_size: int, gamma: float) -> npt.NDArray[np.int64]:
    """The first int(gamma * vocab_size) of a permutation seeded by the last token, int64[G].

    PyTorch's generator for CPUs, whatever device the model is on.
    """
    generator = torch.Generator().manual_seed(_HASH_KEY * last_token)
    order = torch.randperm(vocab_size, generator=generator)
    return order[: int(gamma * vocab_size)].numpy()


def apply_watermark(scores: npt.NDArray[np.float32], last_token: int, params: np.void) -> None:
    """Adds the row's delta to favoured tokens, in place; nothing where it has no watermark.

    scores: float32[vocab]; last_token: of prompt and answer so far; params: the row's record.
    """
    if params["watermark_gamma"]:
        favoured = favoured_tokens(last_token, len(scores), float(params["watermark_gamma"]))
        scores[favoured] += params["watermark_delta"]
