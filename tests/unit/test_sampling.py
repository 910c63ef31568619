"""The sampler against a slow reference that takes one row at a time, and its promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from headgate.kernels.philox import Draw, gumbel_noise_at
from headgate.proto.messages import RowSampling, TopTokens
from headgate.shard.sampling.filters import Candidates, apply_filters, floor_of_best
from headgate.shard.sampling.logprobs import best_tokens, token_logprobs
from headgate.shard.sampling.params import History, SampledRows, params_array
from headgate.shard.sampling.penalties import apply_penalties, needs_history
from headgate.shard.sampling.sampler import sample
from headgate.shard.sampling.token_bias import TokenBias

VOCAB = 97
INF = math.inf


@dataclass
class Row:
    """One row for a test."""

    sampling: RowSampling
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    banned: Sequence[int] = ()


def row(prompt: Sequence[int] = (), output: Sequence[int] = (), **sampling: float) -> Row:
    return Row(RowSampling(max_new_tokens=99, **sampling), prompt, output)  # type: ignore[arg-type]


def sampled_rows(rows: Sequence[Row]) -> SampledRows:
    params = params_array([entry.sampling for entry in rows])
    return SampledRows(
        params=params,
        output_positions=np.array([len(entry.output) for entry in rows], np.int64),
        histories={
            index: history(rows[index]) for index in np.flatnonzero(needs_history(params)).tolist()
        },
        banned={index: np.array(entry.banned) for index, entry in enumerate(rows) if entry.banned},
    )


def history(entry: Row) -> History:
    return History(np.array([*entry.prompt, *entry.output], np.int32), len(entry.prompt))


def filtered(probabilities: Sequence[float], **sampling: float) -> list[int]:
    """Ids that survive the filters."""
    scores = np.log(np.array(probabilities)).astype(np.float32)
    candidates = Candidates(np.arange(len(scores)), scores)
    return apply_filters(candidates, params_array([row(**sampling).sampling])[0]).ids.tolist()


# ------------------------------------------------------------------ reference


def reference_token(logits: list[float], entry: Row) -> int:
    """What `sample` promises, by the definitions."""
    sampling, seen = entry.sampling, set(entry.prompt) | set(entry.output)
    scores = list(logits)
    for token in seen:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token in set(entry.output):
        count = list(entry.output).count(token)
        scores[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    for token in entry.banned:
        scores[token] = -INF
    if not sampling.temperature:
        return scores.index(max(scores))
    probabilities = _softmax([score / sampling.temperature for score in scores])
    probabilities = reference_filters(probabilities, sampling)
    draw = Draw(sampling.seed, len(entry.output), sampling.sample_index)
    noise = gumbel_noise_at(draw, np.arange(len(logits)))
    perturbed = [
        math.log(p) + float(n) if p else -INF for p, n in zip(probabilities, noise, strict=True)
    ]
    return perturbed.index(max(perturbed))


def reference_filters(probabilities: list[float], sampling: RowSampling) -> list[float]:
    by_probability = lambda p: sorted(range(len(p)), key=lambda i: (-p[i], i))  # noqa: E731
    if sampling.top_k:
        probabilities = _keep(probabilities, by_probability(probabilities)[: sampling.top_k])
    if sampling.top_p < 1:
        order = by_probability(probabilities)
        probabilities = _keep(probabilities, _until(order, probabilities, sampling.top_p))
    if sampling.typical_p < 1:
        entropy = -sum(p * math.log(p) for p in probabilities if p)
        unusual = [abs(-math.log(p) - entropy) if p else INF for p in probabilities]
        order = sorted(range(len(unusual)), key=lambda i: (unusual[i], i))
        probabilities = _keep(probabilities, _until(order, probabilities, sampling.typical_p))
    floor = sampling.min_p * max(probabilities)
    return _keep(probabilities, [i for i, p in enumerate(probabilities) if p >= floor])


def _until(order: list[int], probabilities: list[float], mass: float) -> list[int]:
    kept, total = [], 0.0
    for token in order:
        kept.append(token)
        total += probabilities[token]
        if total >= mass:
            break
    return kept


def _keep(probabilities: list[float], kept: list[int]) -> list[float]:
    total = sum(probabilities[token] for token in kept)
    return [p / total if token in set(kept) else 0.0 for token, p in enumerate(probabilities)]


def _softmax(scores: list[float]) -> list[float]:
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    return [weight / sum(weights) for weight in weights]


def random_row(random: np.random.Generator) -> Row:
    """Every parameter neutral half of the time."""

    def maybe(value: float, neutral: float) -> float:
        return value if random.random() < 0.5 else neutral

    return Row(
        RowSampling(
            max_new_tokens=99,
            temperature=maybe(random.uniform(0.2, 2), 0.0),
            top_k=int(maybe(random.integers(1, VOCAB + 9), 0)),
            top_p=maybe(random.uniform(0.05, 0.99), 1.0),
            typical_p=maybe(random.uniform(0.05, 0.99), 1.0),
            min_p=maybe(random.uniform(0.001, 0.5), 0.0),
            repetition_penalty=maybe(random.uniform(0.5, 2), 1.0),
            frequency_penalty=maybe(random.uniform(-2, 2), 0.0),
            presence_penalty=maybe(random.uniform(-2, 2), 0.0),
            seed=int(random.integers(0, 2**63)) * 2 + 1,
            sample_index=int(random.integers(0, 5)),
        ),
        prompt=random.integers(0, VOCAB, random.integers(1, 20)).tolist(),
        output=random.integers(0, VOCAB, random.integers(0, 20)).tolist(),
        banned=random.integers(0, VOCAB, random.integers(0, 3)).tolist(),
    )


@pytest.mark.parametrize("seed", range(20))
def test_batches_equal_the_reference_row_by_row(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = [random_row(random) for _ in range(16)]
    logits = torch.from_numpy(random.normal(0, 3, (len(rows), VOCAB)).astype(np.float32))
    before = logits.clone()
    tokens = sample(logits, sampled_rows(rows))
    assert torch.equal(logits, before)
    assert tokens.tolist() == [
        reference_token(values, entry) for values, entry in zip(logits.tolist(), rows, strict=True)
    ]


@pytest.mark.parametrize("vocab_size", [VOCAB, 5003])
def test_a_row_does_not_depend_on_the_others(vocab_size: int) -> None:
    random = np.random.default_rng(7)
    rows = [random_row(random) for _ in range(24)]
    logits = torch.from_numpy(random.normal(0, 2, (len(rows), vocab_size)).astype(np.float32))
    together = sample(logits, sampled_rows(rows)).tolist()
    alone = [
        int(sample(logits[index : index + 1], sampled_rows([entry]))[0])
        for index, entry in enumerate(rows)
    ]
    assert together == alone


# ------------------------------------------------------------------ choosing


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    assert sample(logits, sampled_rows([row(), row()])).tolist() == [1, 0]


def test_sampling_follows_the_distribution() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    logits = torch.tensor([probabilities]).log().repeat(64, 1)
    counts = np.zeros(4)
    for seed in range(64):
        rows = [row(temperature=1.0, seed=seed, sample_index=index) for index in range(64)]
        counts += np.bincount(sample(logits, sampled_rows(rows)), minlength=4)
    assert counts / counts.sum() == pytest.approx(probabilities, abs=0.02)


def test_the_seed_decides_and_so_do_position_and_sample_index() -> None:
    logits = torch.zeros(4, 1000)
    base = row(temperature=1.0, seed=5)
    rows = [
        base,
        base,
        replace(base, output=[1]),
        replace(base, sampling=replace(base.sampling, sample_index=1)),
    ]
    tokens = sample(logits, sampled_rows(rows)).tolist()
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 3


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[-40.0, 90.0, 89.0, 1e4, -1e30]])
    assert sample(logits, sampled_rows([row(temperature=temperature, seed=3)])).tolist() == [3]


def test_banned_tokens_are_never_taken() -> None:
    logits = torch.tensor([[5.0, 9.0, 1.0]] * 2)
    rows = [replace(row(), banned=[1]), replace(row(temperature=0.1), banned=[0, 1])]
    assert sample(logits, sampled_rows(rows)).tolist() == [0, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_biases_move_tokens_and_leave_the_logits_as_they_are(temperature: float) -> None:
    sampling = RowSampling(max_new_tokens=1, temperature=temperature, logit_bias=((2, 100.0),))
    bias = TokenBias.of(sampling, 4)
    assert bias is not None
    logits = torch.tensor([[5.0, 1.0, 0.0, 1.0]] * 2)
    rows = SampledRows(params_array([sampling] * 2), np.zeros(2, np.int64), biases={0: bias})
    tokens = sample(logits, rows).tolist()
    assert tokens[0] == 2
    if not temperature:
        assert tokens[1] == 0
    assert logits.tolist() == [[5.0, 1.0, 0.0, 1.0]] * 2
    ban = TokenBias.of(replace(sampling, logit_bias=((0, -100.0), (1, 0.5))), 4)
    assert ban is not None
    assert sample(logits, replace(rows, biases={0: ban})).tolist()[0] != 0


def test_a_row_that_says_nothing_of_tokens_has_no_bias() -> None:
    assert TokenBias.of(RowSampling(max_new_tokens=1), 4) is None


def test_nan_logits_do_not_end_the_process() -> None:
    logits = torch.full((3, 8), torch.nan)
    rows = [row(), row(temperature=1.0), row(temperature=1.0, top_p=0.5, typical_p=0.5)]
    tokens = sample(logits, sampled_rows(rows))
    assert all(0 <= token < 8 for token in tokens.tolist())
    token_logprobs(logits, tokens, [2, 0, 8])


# ------------------------------------------------------------------ penalties


def penalized(scores: list[float], entry: Row) -> list[float]:
    values = np.array(scores, np.float32)
    apply_penalties(values, history(entry), params_array([entry.sampling])[0])
    return values.tolist()


def test_repetition_counts_prompt_and_output_once() -> None:
    entry = row(prompt=[0, 0, 1], output=[0, 2], repetition_penalty=2.0)
    assert penalized([2.0, -2.0, 2.0, 2.0], entry) == [1.0, -4.0, 1.0, 2.0]


def test_frequency_and_presence_count_the_output_only() -> None:
    entry = row(prompt=[0, 0], output=[1, 2, 2, 2], frequency_penalty=0.5, presence_penalty=0.25)
    assert penalized([0.0] * 4, entry) == [0.0, -0.75, -1.75, 0.0]


# ------------------------------------------------------------------ filters

PROBABILITIES = [0.05, 0.4, 0.25, 0.2, 0.1]


@pytest.mark.parametrize(
    ("sampling", "survivors"),
    [
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 2]),
        ({"top_p": 0.001}, [1]),
        ({"top_p": 0.8499}, [1, 2, 3]),
        ({"min_p": 0.5}, [1, 2, 3]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.4}, [1]),  # 0.4 of 0.85 is more than 0.4
        ({"top_k": 2, "min_p": 0.01}, [1, 2]),
        # The entropy is 1.41: 0.25 (1.39) is the most usual, then 0.2 (1.61), then 0.4 (0.92).
        ({"typical_p": 0.2}, [2]),
        ({"typical_p": 0.3}, [2, 3]),
        ({"typical_p": 0.5}, [1, 2, 3]),
    ],
)
def test_filters(sampling: dict[str, float], survivors: list[int]) -> None:
    assert filtered(PROBABILITIES, **sampling) == survivors


@pytest.mark.parametrize("sampling", [{"top_k": 2}, {"top_p": 0.4}, {"typical_p": 0.4}])
def test_ties_at_the_edge_go_to_the_lowest_ids(sampling: dict[str, float]) -> None:
    assert filtered([0.1, 0.3, 0.3, 0.3], **sampling) == [1, 2]


@pytest.mark.parametrize("count", [1, 5, 31, 40, 1000])
def test_the_best_tokens_reach_the_floor(count: int) -> None:
    scores = np.random.default_rng(count).normal(0, 3, 1009).astype(np.float32).round(1)
    best = np.sort(scores)[::-1][:count]
    assert (best >= floor_of_best(scores, count)).all()


# ------------------------------------------------------------------ logprobs


def test_top_tokens_as_the_original_orders_them_but_exactly_n() -> None:
    logprobs = torch.tensor([-1.0, -3.0, -4.0, -2.0, -3.0])
    logits = logprobs.repeat(5, 1)
    _, top = token_logprobs(logits, np.zeros(5, np.int64), [0, 2, 3, 4, 5])
    assert [list(places.ids) for places in top] == [
        [],
        [0, 3],
        [0, 3, 1],
        [0, 3, 1, 4],
        [0, 3, 1, 4, 2],
    ]


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    random = np.random.default_rng(1)
    logits = torch.from_numpy(random.normal(0, 3, (6, VOCAB)).astype(np.float32))
    tokens = random.integers(0, VOCAB, 6)
    values, top = token_logprobs(logits, tokens, [0] * 6)
    expected = [
        math.log(_softmax(scores)[token])
        for scores, token in zip(logits.tolist(), tokens.tolist(), strict=True)
    ]
    assert values == pytest.approx(expected, abs=1e-5)
    assert top == []


def test_no_alternatives_is_an_empty_list() -> None:
    _, top = token_logprobs(torch.zeros(2, 4), np.zeros(2, np.int64), [0, 1])
    assert top == [TopTokens((), ()), TopTokens([0], [pytest.approx(-math.log(4))])]


def test_ties_at_the_edge_beside_clear_rows() -> None:
    random = np.random.default_rng(2)
    logits = torch.from_numpy(random.normal(0, 1, (9, VOCAB)).astype(np.float32))
    logits[::2] = logits[::2].round()
    for count in (1, 3, VOCAB - 1, VOCAB, VOCAB + 5):
        ids, values = best_tokens(logits, count)
        ordered = logits.sort(dim=1, descending=True, stable=True)
        assert torch.equal(ids, ordered.indices[:, :count])
        assert torch.equal(values, ordered.values[:, :count])
