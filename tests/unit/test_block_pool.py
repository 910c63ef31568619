"""The block pool: states, order of eviction, and a random walk with a model beside it."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from headgate.router.block_pool import BlockPool


def make_pool(num_blocks: int = 4, run_length: int = 1) -> tuple[BlockPool, list[int]]:
    evicted: list[int] = []
    return BlockPool(num_blocks, evicted.append, run_length), evicted


def take(pool: BlockPool, count: int, after: int | None = None) -> list[int]:
    blocks = pool.allocate(count, after)
    assert blocks is not None
    return blocks


def keep(pool: BlockPool, blocks: list[int]) -> None:
    """Gives back blocks whose content stays wanted."""
    for block in blocks:
        pool.retain(block)
    pool.release(blocks)


def test_all_blocks_are_free_at_first() -> None:
    pool, _ = make_pool()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (4, 0, 0)
    assert take(pool, 4) == [0, 1, 2, 3]
    assert pool.num_used == 4


def test_allocating_too_many_does_nothing() -> None:
    pool, _ = make_pool()
    take(pool, 2)
    assert pool.allocate(3) is None
    assert pool.num_available == 2
    pool.check_integrity()


def test_a_shared_block_is_free_after_its_last_release() -> None:
    pool, _ = make_pool()
    blocks = take(pool, 1)
    pool.share(blocks[0])
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_free == 4


def test_releasing_too_often_is_an_error() -> None:
    pool, _ = make_pool()
    blocks = take(pool, 1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released too often"):
        pool.release(blocks)


def test_a_free_block_cannot_be_shared() -> None:
    pool, _ = make_pool()
    with pytest.raises(KeyError):
        pool.share(0)


def test_empty_blocks_are_taken_before_cached_ones() -> None:
    pool, evicted = make_pool()
    keep(pool, take(pool, 2))
    assert (pool.num_free, pool.num_cached) == (2, 2)
    assert take(pool, 2) == [2, 3]
    assert evicted == []


def test_eviction_takes_the_longest_unused_table_and_its_tail_first() -> None:
    pool, evicted = make_pool(6)
    old, new = take(pool, 3), take(pool, 3)
    keep(pool, old)
    keep(pool, new)
    assert take(pool, 4) == [2, 1, 0, 5] == evicted
    pool.check_integrity()


def test_sharing_a_cached_block_makes_it_recently_used() -> None:
    pool, evicted = make_pool(2)
    keep(pool, take(pool, 2))  # 1 is the older one now, as the tail
    pool.share(1)
    pool.release([1])
    assert take(pool, 1) == [0] == evicted


def test_an_evicted_block_is_an_ordinary_one_again() -> None:
    pool, _ = make_pool(1)
    for _ in range(2):
        keep(pool, take(pool, 1))
    pool.release(take(pool, 1))
    assert (pool.num_free, pool.num_cached) == (1, 0)


def test_what_is_of_no_worth_after_all_is_free_once_released() -> None:
    pool, _ = make_pool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block in blocks:
        pool.retain(block)
    pool.release(blocks[:1])
    for block in blocks:
        pool.discard(block)
    pool.check_integrity()
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.release(blocks[1:])
    assert (pool.num_free, pool.num_cached) == (2, 0)


def test_tables_that_grow_in_turn_lie_side_by_side() -> None:
    pool, _ = make_pool(24, run_length=4)
    tables = [take(pool, 2), take(pool, 1), take(pool, 3)]
    for _ in range(4):
        for table in tables:
            table += take(pool, 1, table[-1])
    assert tables == [
        [0, 1, 2, 3, 16, 17],
        [4, 5, 6, 7, 20],
        [8, 9, 10, 11, 12, 13, 14],
    ]


def test_the_longest_unused_run_is_evicted_as_a_whole() -> None:
    pool, evicted = make_pool(8, run_length=4)
    low, high = take(pool, 4), take(pool, 4)
    keep(pool, high)
    keep(pool, low)
    assert take(pool, 2) == [4, 5]
    assert sorted(evicted) == high
    assert take(pool, 2, 5) == [6, 7]
    pool.check_integrity()


def test_what_is_free_in_unused_runs_is_taken_before_anything_is_evicted() -> None:
    pool, evicted = make_pool(8, run_length=4)
    first, second = take(pool, 2), take(pool, 4)
    keep(pool, first)
    assert second == [4, 5, 6, 7]
    assert take(pool, 2) == [2, 3]
    assert evicted == []


def test_a_cached_block_beside_the_last_one_is_not_taken_for_that() -> None:
    pool, evicted = make_pool(8, run_length=4)
    table = take(pool, 3)
    keep(pool, table)
    pool.share(0)
    assert take(pool, 1, 0) == [4]
    assert evicted == []


def test_the_last_blocks_lie_between_used_ones() -> None:
    pool, evicted = make_pool(8, run_length=4)
    tables = [take(pool, 1), take(pool, 3)]
    keep(pool, [tables[1].pop()])
    assert take(pool, 1, 0) == [1]
    assert take(pool, 2) == [2, 3]
    assert evicted == []
    assert take(pool, 2) == [7, 6]
    assert evicted == [6]
    assert pool.allocate(1) is None
    pool.check_integrity()


@pytest.mark.parametrize(("run_length", "least"), [(8, 0.8), (1, 0.0)])
def test_blocks_of_long_use_still_lie_side_by_side(run_length: int, least: float) -> None:
    """As in a server that has computed for long: all is cached, and many answers grow at once."""
    rng = random.Random(0)
    pool, _ = make_pool(400, run_length)
    growing: list[tuple[list[int], int]] = []
    beside = pairs = 0
    for _ in range(20_000):
        while len(growing) < 8:
            growing.append((take(pool, rng.randint(1, 12)), rng.randint(13, 24)))
        table, length = growing.pop(rng.randrange(len(growing)))
        if len(table) < length:
            table += take(pool, 1, table[-1])
            growing.append((table, length))
            continue
        beside += sum(left + 1 == right for left, right in itertools.pairwise(table))
        pairs += length - 1
        keep(pool, table)
    assert pool.num_cached > 200
    assert least <= beside / pairs < least + 0.2


@pytest.mark.parametrize("run_length", [1, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_random_walk(seed: int, run_length: int) -> None:
    rng = random.Random(seed)
    pool, evicted = make_pool(12, run_length)
    tables: list[list[int]] = []
    kept: set[int] = set()  # cached or to be
    for _ in range(1500):
        action = rng.randrange(4)
        if action == 0:
            count = rng.randrange(5)
            before, available = len(evicted), pool.num_available
            last = rng.choice(tables)[-1] if tables and rng.random() < 0.5 else None
            blocks = pool.allocate(count, last)
            assert (blocks is None) == (count > available)
            if blocks:
                tables.append(blocks)
            kept -= set(evicted[before:])
        elif action == 1 and tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        elif action == 2 and tables:
            block = rng.choice(rng.choice(tables))
            pool.retain(block)
            kept.add(block)
        elif action == 3 and kept:
            block = rng.choice(sorted(kept))
            pool.share(block)
            tables.append([block])
        pool.check_integrity()
        held = Counter(block for table in tables for block in table)
        assert all(pool.ref_count(block) == held[block] for block in range(12))
        assert pool.num_cached == len(kept - set(held))
        assert pool.retained() == kept
