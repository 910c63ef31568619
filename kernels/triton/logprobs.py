"""Logprobs of chosen tokens and of the likeliest ones, without a table of all logprobs or a sort.

Shapes: logits float32[R, V], tokens int64[R] -> float32[R]; the `count` likeliest int64 and
float32[R, count], best first, equal ones in order of id. Bytes moved: 4 V a row twice, and 4 V for
each of the likeliest, from the second-level cache. Operations: an exponential for each logit.

One program has one row and sums it in a fixed order: its bits depend on nothing else. NaN counts
as the worst.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels.triton.launch import launch

_BLOCK = 2048


@triton.jit(do_not_specialize=["count"])
def logprobs_kernel(
    chosen_ptr,
    ids_ptr,
    values_ptr,
    logits_ptr,
    tokens_ptr,
    stride,
    count,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(row_ptr + token, token < VOCABULARY, float("-inf")))
    best = tl.max(top, 0)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, token < VOCABULARY, float("-inf"))
        total += tl.exp(x - best)
    log_sum = best + tl.log(tl.sum(total, 0))
    tl.store(chosen_ptr + row, tl.load(row_ptr + tl.load(tokens_ptr + row)) - log_sum)
    # Each of the likeliest is the best of those that come after the one before.
    last_value = tl.full([], float("inf"), tl.float32)
    last_id = tl.full([], -1, tl.int32)
    for place in range(0, count):
        most = tl.full([], float("-inf"), tl.float32)
        winner = tl.full([], 0x7FFFFFFF, tl.int32)
        for start in range(0, VOCABULARY, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + token, token < VOCABULARY, float("-inf"))
            x = tl.where(x != x, float("-inf"), x)
            left = (x < last_value) | ((x == last_value) & (token > last_id))
            left &= token < VOCABULARY
            x = tl.where(left, x, float("-inf"))
            here = tl.max(x, 0)
            first = tl.min(tl.where(left & (x == here), token, 0x7FFFFFFF), 0)
            better = (here > most) | (winner == 0x7FFFFFFF)
            winner = tl.where(better, first, winner)
            most = tl.where(better, here, most)
        tl.store(ids_ptr + row * count + place, winner.to(tl.int64))
        tl.store(values_ptr + row * count + place, most - log_sum)
        last_value, last_id = most, winner


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob of each row's token, the `count` likeliest tokens, their logprobs)."""
    rows, vocabulary = logits.shape
    chosen = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ids = torch.empty((rows, count), dtype=torch.int64, device=logits.device)
    values = torch.empty((rows, count), dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    launch(
        logprobs_kernel,
        (rows,),
        (chosen, ids, values, logits, tokens, logits.stride(0), count),
        {"VOCABULARY": vocabulary, "BLOCK": block},
        warps=8 if block == _BLOCK else 4,
    )
    return chosen, ids, values
