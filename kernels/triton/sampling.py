"""The next token of each row: filters without a sort, then the Gumbel-max rule with Philox noise.

Shapes: logits float32[R, V], left as they are; parameters as in `kernels/sampled_rows.py`; tokens
int64[R]. Bytes moved: 4 V a row to find its best score, as much again for the draw, and for each
filter asked for about 35 more visits of the row, which stays in the GPU's second-level cache.
Operations: Philox and two float64 logarithms for each token that may win.

A filter keeps the fewest tokens, best first, that reach a number (top-k) or a mass (top-p and
typical-p). Instead of sorting, the last key that is kept is found by bisection over its bits, the
weight of all keys up to the middle being summed at each step; of the tokens that tie there the
lowest ids stay. A row's filters so come down to a few numbers, `limits`, and the draw compares with
them. The order is top-k, top-p, typical-p, min-p, each on what the one before left, renormalised.

Exactness: one program has one row's filters, and the draw's parts have fixed sizes, so that a row's
token depends on nothing but its own scores and parameters. Noise is that of
`kernels/philox.py`, bit for bit up to the logarithms' last bits; sums of probabilities are
float64 in another order than NumPy's, which can only matter to a mass within 1e-7 of the limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headgate.kernels.sampled_rows import RowsToSample
from headgate.kernels.triton.launch import launch
from headgate.kernels.triton.penalties import mask, penalise

_BLOCK = 4096
_PART = 16384  # tokens that one program draws from
_REACH = tl.constexpr(26.02)  # the noise spans no more: a score this far below the best cannot win
_NONE = tl.constexpr(0x7FFFFFFF)  # a key that no token has; also an id
# Filters' numbers, by their place in a row of `limits`.
_LIMITS = 5  # key, last id at it, entropy, distance key, last id at it
_COUNT, _MASS, _TYPICAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _scores(row_ptr, token, VOCABULARY: tl.constexpr, best, temperature):
    """Log-probabilities but for a constant, 0 for the best; -inf beyond the vocabulary."""
    raw = tl.load(row_ptr + token, token < VOCABULARY, float("-inf"))
    floor = best - _REACH * temperature
    score = tl.div_rn(raw - best, temperature + tl.full(raw.shape, 0.0, tl.float32))
    return tl.where((raw >= floor) & (token < VOCABULARY), score, float("-inf"))


@triton.jit
def _kept(score, token, key_limit, last_id, entropy, distance_limit, last_distance_id):
    """Whether a token is within the limits so far. Keys are the bits of numbers >= 0."""
    key = tl.abs(score).to(tl.int32, bitcast=True)
    near = tl.abs(-score - entropy).to(tl.int32, bitcast=True)
    kept = (score != float("-inf")) & (
        (key < key_limit) | ((key == key_limit) & (token <= last_id))
    )
    return kept & (
        (near < distance_limit) | ((near == distance_limit) & (token <= last_distance_id))
    )


@triton.jit
def _weighed(
    row_ptr,
    token,
    best,
    temperature,
    key_limit,
    last_id,
    entropy,
    KIND: tl.constexpr,
    VOCABULARY: tl.constexpr,
):
    """(whether it is kept so far, the key it is ordered by, its weight) of each token."""
    score = _scores(row_ptr, token, VOCABULARY, best, temperature)
    kept = _kept(score, token, key_limit, last_id, 0.0, _NONE, _NONE)
    if KIND == 2:
        key = tl.abs(-score - entropy).to(tl.int32, bitcast=True)
    else:
        key = tl.abs(score).to(tl.int32, bitcast=True)
    if KIND == 0:
        weight = tl.full(score.shape, 1.0, tl.float64)
    else:
        weight = tl.exp(score).to(tl.float64)
    return kept, key, weight


@triton.jit
def _edge(
    row_ptr,
    best,
    temperature,
    key_limit,
    last_id,
    entropy,
    target,
    KIND: tl.constexpr,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(last key kept, last id kept at that key): the fewest tokens that reach `target`.

    KIND _COUNT: a number of tokens; _MASS and _TYPICAL: their weights exp(score), not normalised.
    """
    low, high = 0, 0x7F800000
    while low < high:
        middle = low + (high - low) // 2
        reached = tl.full([], 0.0, tl.float64)
        for start in range(0, VOCABULARY, BLOCK):
            token = start + tl.arange(0, BLOCK)
            kept, key, weight = _weighed(
                row_ptr, token, best, temperature, key_limit, last_id, entropy, KIND, VOCABULARY
            )
            reached += tl.sum(tl.where(kept & (key <= middle), weight, 0.0), 0)
        enough = reached >= target
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    # What lies below the edge, and one token's weight at it.
    below = tl.full([], 0.0, tl.float64)
    single = tl.full([], 0.0, tl.float64)
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        kept, key, weight = _weighed(
            row_ptr, token, best, temperature, key_limit, last_id, entropy, KIND, VOCABULARY
        )
        below += tl.sum(tl.where(kept & (key < low), weight, 0.0), 0)
        single = tl.maximum(single, tl.max(tl.where(kept & (key == low), weight, 0.0), 0))
    # Of the tokens at the edge as many as are needed, in order of id. At a typical-p edge two
    # scores can be equally far from the entropy, and then count as equally heavy.
    seen = tl.full([], 0, tl.int32)
    edge_id = tl.full([], 0x7FFFFFFF, tl.int32)
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        kept, key, _ = _weighed(
            row_ptr, token, best, temperature, key_limit, last_id, entropy, KIND, VOCABULARY
        )
        tie = (kept & (key == low)).to(tl.int32)
        place = seen + tl.cumsum(tie, 0)
        full = below + place.to(tl.float64) * single >= target
        edge_id = tl.minimum(edge_id, tl.min(tl.where((tie > 0) & full, token, 0x7FFFFFFF), 0))
        seen += tl.sum(tie, 0)
    return low, edge_id


@triton.jit
def _mass_and_entropy(
    row_ptr,
    best,
    temperature,
    key_limit,
    last_id,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(sum of weights, mean surprise in nats less the log of the sum) of the tokens kept."""
    mass = tl.full([], 0.0, tl.float64)
    surprise = tl.full([], 0.0, tl.float64)
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = _scores(row_ptr, token, VOCABULARY, best, temperature)
        kept = _kept(score, token, key_limit, last_id, 0.0, _NONE, _NONE)
        weight = tl.where(kept, tl.exp(score), 0.0).to(tl.float64)
        mass += tl.sum(weight, 0)
        surprise += tl.sum(weight * tl.where(kept, -score, 0.0).to(tl.float64), 0)
    return mass, surprise / mass


@triton.jit
def limits_kernel(
    bests_ptr,
    limits_ptr,
    entropies_ptr,
    scores_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    typical_p_ptr,
    min_p_ptr,
    stride,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's best score, and what its filters leave."""
    row = tl.program_id(0)
    row_ptr = scores_ptr + row.to(tl.int64) * stride
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        raw = tl.load(row_ptr + token, token < VOCABULARY, float("-inf"))
        top = tl.maximum(top, tl.where(raw != raw, float("inf"), raw))
    best = tl.max(top, 0)
    tl.store(bests_ptr + row, best)
    key_limit = tl.full([], 0x7FFFFFFF, tl.int32)
    last_id = tl.full([], 0x7FFFFFFF, tl.int32)
    distance_limit = tl.full([], 0x7FFFFFFF, tl.int32)
    last_distance_id = tl.full([], 0x7FFFFFFF, tl.int32)
    entropy = tl.full([], 0.0, tl.float32)
    floor_key = tl.full([], 0x7FFFFFFF, tl.int32)
    temperature = tl.load(temperature_ptr + row)
    # Of a broken model's scores the best is taken; and greedy rows have no filters.
    if (temperature > 0) & (tl.abs(best) < float("inf")):
        top_k = tl.load(top_k_ptr + row)
        if top_k > 0:
            key_limit, last_id = _edge(
                row_ptr, best, temperature, key_limit, last_id, entropy,
                top_k.to(tl.float64), 0, VOCABULARY, BLOCK,
            )  # fmt: skip
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            mass, _ = _mass_and_entropy(
                row_ptr, best, temperature, key_limit, last_id, VOCABULARY, BLOCK
            )
            key_limit, last_id = _edge(
                row_ptr, best, temperature, key_limit, last_id, entropy,
                top_p.to(tl.float64) * mass, 1, VOCABULARY, BLOCK,
            )  # fmt: skip
        typical_p = tl.load(typical_p_ptr + row)
        if typical_p < 1.0:
            mass, surprise = _mass_and_entropy(
                row_ptr, best, temperature, key_limit, last_id, VOCABULARY, BLOCK
            )
            entropy = surprise.to(tl.float32)
            distance_limit, last_distance_id = _edge(
                row_ptr, best, temperature, key_limit, last_id, entropy,
                typical_p.to(tl.float64) * mass, 2, VOCABULARY, BLOCK,
            )  # fmt: skip
        min_p = tl.load(min_p_ptr + row)
        if min_p > 0.0:
            top = tl.full([BLOCK], float("-inf"), tl.float32)
            for start in range(0, VOCABULARY, BLOCK):
                token = start + tl.arange(0, BLOCK)
                score = _scores(row_ptr, token, VOCABULARY, best, temperature)
                kept = _kept(
                    score, token, key_limit, last_id, entropy, distance_limit, last_distance_id
                )
                top = tl.maximum(top, tl.where(kept, score, float("-inf")))
            floor = tl.max(top, 0) + tl.log(min_p)
            floor_key = tl.abs(floor).to(tl.int32, bitcast=True)
    at = limits_ptr + row * 5
    tl.store(at, key_limit)
    tl.store(at + 1, last_id)
    tl.store(at + 2, distance_limit)
    tl.store(at + 3, last_distance_id)
    tl.store(at + 4, floor_key)
    tl.store(entropies_ptr + row, entropy)


@triton.jit
def _noise(seed, position, sample_index, token):
    """Standard Gumbel noise of the row's token, as `kernels/philox.py` says."""
    zero = tl.full(token.shape, 0, tl.uint32)
    c0 = (token // 4).to(tl.uint32)
    c1, c2, c3 = zero + position.to(tl.uint32), zero + sample_index.to(tl.uint32), zero
    k0 = zero + (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first, second = zero + 0xD2511F53, zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(first, c0), first * c0
        high1, low1 = tl.umulhi(second, c2), second * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    lane = token % 4
    word = tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))
    uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def draw_kernel(
    values_ptr,
    tokens_ptr,
    bests_ptr,
    limits_ptr,
    entropies_ptr,
    scores_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    sample_index_ptr,
    stride,
    VOCABULARY: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest score + noise within one part of a row, and the lowest token that has it."""
    row, part = tl.program_id(0), tl.program_id(1)
    row_ptr = scores_ptr + row.to(tl.int64) * stride
    best = tl.load(bests_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    greedy = (temperature <= 0) | (tl.abs(best) == float("inf"))
    at = limits_ptr + row * 5
    key_limit, last_id = tl.load(at), tl.load(at + 1)
    distance_limit, last_distance_id = tl.load(at + 2), tl.load(at + 3)
    floor_key, entropy = tl.load(at + 4), tl.load(entropies_ptr + row)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    sample_index = tl.load(sample_index_ptr + row)
    highest = tl.full([], float("-inf"), tl.float32)
    winner = tl.full([], 0x7FFFFFFF, tl.int32)
    for start in range(part * PART, part * PART + PART, BLOCK):
        token = start + tl.arange(0, BLOCK)
        if greedy:
            raw = tl.load(row_ptr + token, token < VOCABULARY, float("-inf"))
            value = tl.where(raw != raw, float("inf"), raw)
        else:
            score = _scores(row_ptr, token, VOCABULARY, best, temperature)
            kept = _kept(
                score, token, key_limit, last_id, entropy, distance_limit, last_distance_id
            )
            kept &= tl.abs(score).to(tl.int32, bitcast=True) <= floor_key
            value = tl.full([BLOCK], float("-inf"), tl.float32)
            if tl.max(kept.to(tl.int32), 0) > 0:
                noise = _noise(seed, position, sample_index, token)
                value = tl.where(kept, score + noise, float("-inf"))
        most = tl.max(value, 0)
        first = tl.min(tl.where((value == most) & (token < VOCABULARY), token, 0x7FFFFFFF), 0)
        better = (most > highest) | (winner == 0x7FFFFFFF)
        winner = tl.where(better, first, winner)
        highest = tl.where(better, most, highest)
    parts = tl.num_programs(1)
    tl.store(values_ptr + row * parts + part, highest)
    tl.store(tokens_ptr + row * parts + part, winner)


@triton.jit(do_not_specialize=["parts"])
def pick_kernel(out_ptr, values_ptr, tokens_ptr, parts, PARTS: tl.constexpr):
    """The winner of a row's parts."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    value = tl.load(values_ptr + row * parts + part, part < parts, float("-inf"))
    token = tl.load(tokens_ptr + row * parts + part, part < parts, 0x7FFFFFFF)
    most = tl.max(value, 0)
    winner = tl.min(tl.where(value == most, token, 0x7FFFFFFF), 0)
    tl.store(out_ptr + row, winner.to(tl.int64))


def sample_tokens(logits: torch.Tensor, rows: RowsToSample) -> torch.Tensor:
    """The next token of each row, int64[R]; no host synchronisation."""
    count, vocabulary = logits.shape
    scores = logits
    biased = rows.biased
    if biased is not None or rows.penalised is not None or rows.masked is not None:
        scores = logits.clone()
        if biased is not None:
            at = (biased.rows, biased.token_ids)
            scores[at] = scores[at] + biased.values
        if rows.penalised is not None:
            penalise(scores, rows.penalised)
        if rows.masked is not None:
            mask(scores, rows.masked)
    device = logits.device
    bests = torch.empty(count, dtype=torch.float32, device=device)
    entropies = torch.empty(count, dtype=torch.float32, device=device)
    limits = torch.empty((count, _LIMITS), dtype=torch.int32, device=device)
    filters = (rows.top_k, rows.top_p, rows.typical_p, rows.min_p)
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    launch(
        limits_kernel,
        (count,),
        (bests, limits, entropies, scores, rows.temperature, *filters, scores.stride(0)),
        {"VOCABULARY": vocabulary, "BLOCK": block},
        warps=16 if block == _BLOCK else 4,
    )
    part = min(_PART, triton.cdiv(vocabulary, block) * block)
    parts = triton.cdiv(vocabulary, part)
    values = torch.empty((count, parts), dtype=torch.float32, device=device)
    tokens = torch.empty((count, parts), dtype=torch.int32, device=device)
    draws = (rows.temperature, rows.seed, rows.position, rows.sample_index)
    launch(
        draw_kernel,
        (count, parts),
        (values, tokens, bests, limits, entropies, scores, *draws, scores.stride(0)),
        {"VOCABULARY": vocabulary, "PART": part, "BLOCK": min(block, 1024)},
        warps=4,
    )
    out = torch.empty(count, dtype=torch.int64, device=device)
    launch(
        pick_kernel,
        (count,),
        (out, values, tokens, parts),
        {"PARTS": triton.next_power_of_2(parts)},
        warps=1,
    )
    return out
