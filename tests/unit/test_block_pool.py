"""The block pool: states, order of eviction, and a random walk with a model beside it."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from headgate.router.block_pool import BlockPool


def make_pool(num_blocks: int = 4) -> tuple[BlockPool, list[int]]:
    evicted: list[int] = []
    return BlockPool(num_blocks, evicted.append), evicted


def take(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


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
    table = take(pool, 2)
    for block in table:
        pool.retain(block)
    pool.release(table)
    assert (pool.num_free, pool.num_cached) == (2, 2)
    assert take(pool, 2) == [2, 3]
    assert evicted == []


def test_eviction_takes_the_longest_unused_table_and_its_tail_first() -> None:
    pool, evicted = make_pool(6)
    old, new = take(pool, 3), take(pool, 3)
    for block in (*old, *new):
        pool.retain(block)
    pool.release(old)
    pool.release(new)
    assert take(pool, 4) == [2, 1, 0, 5] == evicted
    pool.check_integrity()


def test_sharing_a_cached_block_makes_it_recently_used() -> None:
    pool, evicted = make_pool(2)
    table = take(pool, 2)
    for block in table:
        pool.retain(block)
    pool.release(table)  # 1 is the older one now, as the tail
    pool.share(1)
    pool.release([1])
    assert take(pool, 1) == [0] == evicted


def test_an_evicted_block_is_an_ordinary_one_again() -> None:
    pool, _ = make_pool(1)
    for _ in range(2):
        blocks = take(pool, 1)
        pool.retain(blocks[0])
        pool.release(blocks)
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


@pytest.mark.parametrize("seed", range(5))
def test_random_walk(seed: int) -> None:
    rng = random.Random(seed)
    pool, evicted = make_pool(12)
    tables: list[list[int]] = []
    kept: set[int] = set()  # cached or to be
    for _ in range(1500):
        action = rng.randrange(4)
        if action == 0:
            count = rng.randrange(5)
            before, available = len(evicted), pool.num_available
            blocks = pool.allocate(count)
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
