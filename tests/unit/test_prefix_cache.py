"""The prefix cache: hashes, longest match, first halves, duplicates, its speed when it is large."""

from __future__ import annotations

import time

import pytest

from headgate.router.prefix_cache import PrefixCache, block_hash, root_hash


def chain(*blocks: list[int], adapter_id: str = "") -> list[bytes]:
    hashes = [root_hash(adapter_id)]
    for tokens in blocks:
        hashes.append(block_hash(hashes[-1], tokens))
    return hashes[1:]


def test_hashes_are_128_bits_and_stable() -> None:
    first = chain([1, 2, 3, 4])
    assert len(first[0]) == 16
    assert first == chain([1, 2, 3, 4])


@pytest.mark.parametrize(
    "other",
    [
        chain([1, 2], [3, 5]),
        chain([2, 1], [3, 4]),
        chain([0, 0], [3, 4]),
        chain([1, 2], [3, 4], adapter_id="french"),
        chain([1, 2, 3, 4]),
        chain([1], [2, 3, 4]),
    ],
    ids=["last token", "order", "parent", "adapter", "one block", "block ends"],
)
def test_different_content_has_different_hashes(other: list[bytes]) -> None:
    assert chain([1, 2], [3, 4])[-1] != other[-1]


def test_the_longest_match_ends_at_the_first_gap() -> None:
    cache = PrefixCache()
    hashes = chain([1], [2], [3], [4])
    for index in (0, 1, 3):
        cache.publish(hashes[index], b"half", 10 + index)
    assert cache.longest_match(hashes) == [10, 11]
    assert cache.longest_match(hashes[1:2]) == [11]
    assert cache.longest_match(chain([9], [2])) == []


def test_the_first_of_two_equal_blocks_stays() -> None:
    cache = PrefixCache()
    (key,) = chain([1])
    assert cache.publish(key, b"half", 5)
    assert not cache.publish(key, b"half", 6)
    assert not cache.publish(key, b"half", 5), "a forked row publishes what it shares once more"
    assert cache.longest_match([key]) == [5]
    assert cache.blocks() == {5}
    cache.check_integrity()


def test_a_block_cannot_hold_two_contents() -> None:
    cache = PrefixCache()
    first, second = chain([1], [2])
    cache.publish(first, b"half", 5)
    with pytest.raises(AssertionError):
        cache.publish(second, b"half", 5)


def test_a_forgotten_block_is_not_found_and_may_be_published_again() -> None:
    cache = PrefixCache()
    first, second = chain([1], [2])
    cache.publish(first, b"half", 5)
    cache.forget(5)
    assert cache.longest_match([first]) == []
    assert cache.with_half(b"half") is None
    assert len(cache) == 0
    assert cache.publish(second, b"half", 5)
    cache.check_integrity()


def test_the_newest_block_with_the_same_first_half_is_found() -> None:
    cache = PrefixCache()
    for block, half in enumerate([b"one", b"one", b"two"]):
        cache.publish(bytes([block]), half, block)
    assert cache.with_half(b"one") == 1
    assert cache.with_half(b"one", excluded=[1]) == 0
    assert cache.with_half(b"one", excluded=[0, 1]) is None
    assert cache.with_half(b"three") is None
    cache.forget(1)
    assert cache.with_half(b"one") == 0
    cache.check_integrity()


def test_lookups_are_as_fast_among_100_000_blocks() -> None:
    hashes = chain(*([token] for token in range(64)))

    def seconds(cache: PrefixCache) -> float:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            assert len(cache.longest_match(hashes)) == 64
            cache.with_half(b"half", excluded=range(64, 100_000))
            times.append(time.perf_counter() - start)
        return min(times)

    small, large = PrefixCache(), PrefixCache()
    for block, key in enumerate(hashes):
        small.publish(key, b"half", block)
        large.publish(key, b"half", block)
    for block in range(64, 100_000):
        large.publish(block.to_bytes(16, "little"), b"half", block)
    assert seconds(large) < 20 * seconds(small)  # a walk over all of them would be 1500 times
