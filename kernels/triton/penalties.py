"""What a row's tokens so far, and its grammar, do to its scores.

Shapes: scores float32[R, V], changed in place; the rest as in `kernels/sampled_rows.py`. Bytes
moved: for a penalised row its tokens, then 16 V; for a masked one 8 V and V / 8. Operations: a few
for each score, so it runs at the speed of memory.

Occurrences are counted in a table int32[P, V] by atomic additions of integers, whose order does not
matter: bit 30 says that the token is in the prompt, the bits below count it in the output. Each
score is then computed by itself, so a row's bits depend on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels.sampled_rows import MaskedRows, PenalisedRows
from headgate.kernels.triton.launch import launch

_BLOCK = 1024
_IN_PROMPT = tl.constexpr(1 << 30)


@triton.jit
def count_kernel(
    counts_ptr, tokens_ptr, starts_ptr, prompts_ptr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    start = tl.load(starts_ptr + row)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.load(starts_ptr + row + 1) - start
    token = tl.load(tokens_ptr + start + place, inside, 0)
    prompt = place < tl.load(prompts_ptr + row)
    at = counts_ptr + row.to(tl.int64) * VOCABULARY + token
    tl.atomic_or(at, tl.full([BLOCK], 1 << 30, tl.int32), inside & prompt)
    tl.atomic_add(at, tl.full([BLOCK], 1, tl.int32), inside & (place >= tl.load(prompts_ptr + row)))


@triton.jit
def penalise_kernel(
    scores_ptr,
    counts_ptr,
    rows_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    stride,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    row = tl.load(rows_ptr + index).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCABULARY
    seen = tl.load(counts_ptr + index.to(tl.int64) * VOCABULARY + token, inside, 0)
    times = seen & (_IN_PROMPT - 1)
    score = tl.load(scores_ptr + row * stride + token, inside, 0.0)
    repetition = tl.load(repetition_ptr + index) + tl.full([BLOCK], 0.0, tl.float32)
    once = tl.where(score < 0, score * repetition, tl.div_rn(score, repetition))
    once = tl.where(repetition == 1.0, score, once)
    score = tl.where(seen != 0, once, score)
    penalty = tl.load(frequency_ptr + index) * times.to(tl.float32) + tl.load(presence_ptr + index)
    score = tl.where(times > 0, score - penalty, score)
    tl.store(scores_ptr + row * stride + token, score, inside)


@triton.jit
def mask_kernel(
    scores_ptr, bits_ptr, rows_ptr, stride, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCABULARY
    words: tl.constexpr = (VOCABULARY + 31) // 32
    word = tl.load(bits_ptr + index * words + token // 32, inside, 0)
    barred = ((word >> (token % 32)) & 1) == 0
    nothing = tl.full([BLOCK], float("-inf"), tl.float32)
    tl.store(scores_ptr + row * stride + token, nothing, inside & barred)


def penalise(scores: torch.Tensor, penalised: PenalisedRows) -> None:
    """Penalises each row's tokens as `shard/sampling/penalties.py` does, in place."""
    vocabulary, count = scores.shape[1], penalised.rows.shape[0]
    counts = torch.zeros((count, vocabulary), dtype=torch.int32, device=scores.device)
    constants = {"VOCABULARY": vocabulary, "BLOCK": _BLOCK}
    launch(
        count_kernel,
        (count, triton.cdiv(penalised.longest, _BLOCK)),
        (counts, penalised.token_ids, penalised.starts, penalised.num_prompt),
        constants,
        warps=4,
    )
    strengths = (penalised.repetition, penalised.frequency, penalised.presence)
    launch(
        penalise_kernel,
        (count, triton.cdiv(vocabulary, _BLOCK)),
        (scores, counts, penalised.rows, *strengths, scores.stride(0)),
        constants,
        warps=4,
    )


def mask(scores: torch.Tensor, masked: MaskedRows) -> None:
    """Makes the scores of tokens that a row may not take -inf, in place."""
    vocabulary = scores.shape[1]
    launch(
        mask_kernel,
        (masked.rows.shape[0], triton.cdiv(vocabulary, _BLOCK)),
        (scores, masked.bits, masked.rows, scores.stride(0)),
        {"VOCABULARY": vocabulary, "BLOCK": _BLOCK},
        warps=4,
    )
