"""The forecast: remaining lengths, the peak, and what admission makes of both."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from headgate.proto.messages import RowSampling
from headgate.router.admission import (
    DEFAULT_OUTPUT_TOKENS,
    HISTORY_LENGTH,
    HISTORY_NEEDED,
    Admission,
    OutputLengths,
    PeakForecast,
)
from headgate.router.kv_cache_manager import KVCacheManager
from headgate.router.request import Request


def lengths(kv_overcommit: float, *known: int) -> OutputLengths:
    history = OutputLengths(kv_overcommit)
    for length in known:
        history.record(length)
    return history


HUNDRED = tuple(range(1, 101))


@pytest.mark.parametrize(
    ("overcommit", "known", "generated", "limit", "remaining"),
    [
        (0.5, (), 0, 100, 50),  # nothing known: as if evenly spread
        (0.0, (), 0, 100, 100),
        (0.0, (), 0, 10_000, DEFAULT_OUTPUT_TOKENS),
        (0.25, (), 1000, 10_000, DEFAULT_OUTPUT_TOKENS * 3 // 4),
        (1.0, (), 0, 100, 0),
        (0.1, HUNDRED, 0, 1000, 90),
        (0.1, HUNDRED, 0, 40, 40),  # never more than its own limit
        (0.1, HUNDRED, 50, 1000, 45),  # of those above 50, a tenth is above 95
        (0.1, HUNDRED, 99, 1000, 1),
        (1.0, HUNDRED, 10, 1000, 1),  # the shortest that is longer
        (0.5, HUNDRED, 100, 300, 100),  # longer than all known: as if nothing were known
        (0.5, HUNDRED[: HISTORY_NEEDED - 1], 0, 100, 50),  # too few
    ],
)
def test_remaining_tokens(
    overcommit: float, known: tuple[int, ...], generated: int, limit: int, remaining: int
) -> None:
    assert lengths(overcommit, *known).remaining(generated, limit) == remaining


def test_old_answers_are_forgotten() -> None:
    history = lengths(0.1, *[1000] * HISTORY_LENGTH, *[7] * HISTORY_LENGTH)
    assert history.remaining(0, 2000) == 7


def test_the_peak_equals_a_simulation_in_step() -> None:
    rng = random.Random(3)
    for _ in range(200):
        rows = [(rng.randrange(1, 50), rng.randrange(1, 50)) for _ in range(rng.randrange(1, 8))]
        simulated = max(
            sum(positions + time for positions, remaining in rows if remaining >= time)
            for time in range(51)
        )
        forecast = PeakForecast(rows, shared=0, block_size=0)
        assert forecast.peak() == simulated <= forecast.upper_bound


def test_adding_and_removing_a_row() -> None:
    forecast = PeakForecast([(10, 5), (4, 9)], shared=0, block_size=16)
    before = forecast.peak()
    forecast.add(30, 7, 8)
    same = PeakForecast([(30, 7), (10, 5), (4, 9)], shared=8, block_size=16)
    assert forecast.upper_bound == same.upper_bound == 15 + 13 + 37 + 3 * 8
    assert forecast.peak() == same.peak() > before
    forecast.remove(30, 7, 8)
    assert forecast.peak() == before


def test_a_shared_prefix_counts_once_while_all_run() -> None:
    rows = [(100, 10)] * 4
    assert PeakForecast(rows, shared=3 * 90, block_size=0).peak() == 90 + 4 * 20


class Memory:
    """Running requests over blocks of 4 tokens."""

    def __init__(self, num_blocks: int, kv_overcommit: float) -> None:
        self.kv = KVCacheManager(num_blocks, 4)
        self.admission = Admission(self.kv, kv_overcommit)
        self.running: list[Request] = []

    def offer(self, prompt: int, new: int) -> bool:
        """Each prompt of its own, so that nothing is shared."""
        start = 1000 * len(self.running)
        request = Request(
            len(self.running), range(start, start + prompt), RowSampling(max_new_tokens=new)
        )
        self.admission.open(self.running)
        if not self.admission.fits(request, [], alone=not self.running):
            return False
        assert self.kv.admit(request, [], prompt)
        request.num_prefill_tokens = prompt
        self.running.append(request)
        return True


def test_without_overcommit_every_token_is_reserved() -> None:
    memory = Memory(num_blocks=8, kv_overcommit=0.0)
    assert memory.offer(4, 9)  # 12 positions: 3 blocks
    assert memory.offer(4, 13)  # 4 blocks
    assert not memory.offer(4, 2)  # 2 blocks
    assert memory.offer(3, 2)
    assert memory.admission.peak_blocks(memory.running) == 8


def test_more_overcommit_admits_more() -> None:
    admitted = []
    for overcommit in (0.0, 0.1, 0.5, 1.0):
        memory = Memory(num_blocks=100, kv_overcommit=overcommit)
        while memory.offer(8, 80):
            pass
        admitted.append(len(memory.running))
    assert all(less <= more for less, more in pairwise(admitted))
    assert admitted[0] == 4
    assert admitted[-1] == 28  # 8 positions, one block more, half a block at the end


def test_alone_a_request_is_always_let_in() -> None:
    assert Memory(num_blocks=22, kv_overcommit=0.0).offer(8, 81)
    memory = Memory(num_blocks=22, kv_overcommit=0.1)
    assert memory.offer(80, 9)
    assert not memory.offer(1, 1)
