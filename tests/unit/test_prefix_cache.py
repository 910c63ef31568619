"""The prefix cache: hashes, longest match and beginning, duplicates, its speed when it is large."""

from __future__ import annotations

import time

import pytest

from headgate.router.prefix_cache import BlockContent, PrefixCache, block_hash, root_hash


def contents(*blocks: list[int], adapter_id: str = "") -> list[BlockContent]:
    """Of the blocks of one sequence."""
    parent, found = root_hash(adapter_id), []
    for tokens in blocks:
        found.append(BlockContent.of(block_hash(parent, tokens), parent, tokens))
        parent = found[-1].key
    return found


def chain(*blocks: list[int], adapter_id: str = "") -> list[bytes]:
    return [content.key for content in contents(*blocks, adapter_id=adapter_id)]


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
    blocks = contents([1], [2], [3], [4])
    hashes = [content.key for content in blocks]
    for index in (0, 1, 3):
        cache.publish(blocks[index], 10 + index)
    assert cache.longest_match(hashes) == [10, 11]
    assert cache.longest_match(hashes[1:2]) == [11]
    assert cache.longest_match(chain([9], [2])) == []


def test_the_first_of_two_equal_blocks_stays() -> None:
    cache = PrefixCache()
    (content,) = contents([1])
    assert cache.publish(content, 5)
    assert not cache.publish(content, 6)
    assert not cache.publish(content, 5), "a forked row publishes the block it shares once more"
    assert cache.longest_match([content.key]) == [5]
    assert cache.blocks() == {5}
    cache.check_integrity()


def test_a_block_cannot_hold_two_contents() -> None:
    cache = PrefixCache()
    first, second = contents([1], [2])
    cache.publish(first, 5)
    with pytest.raises(AssertionError):
        cache.publish(second, 5)


def test_a_forgotten_block_is_not_found_and_may_be_published_again() -> None:
    cache = PrefixCache()
    first, second = contents([1], [2])
    cache.publish(first, 5)
    cache.forget(5)
    assert cache.longest_match([first.key]) == []
    assert cache.longest_beginning(first.parent, [1]) == (-1, 0)
    assert len(cache) == 0
    assert cache.publish(second, 5)
    cache.check_integrity()


def test_the_block_with_the_longest_beginning_is_found() -> None:
    cache = PrefixCache()
    root = root_hash("")
    for block, tokens in enumerate([[1, 2, 9, 9], [1, 2, 3, 9], [1, 9, 9, 9], [2, 2, 3, 4]]):
        cache.publish(*contents(tokens), block)
    assert cache.longest_beginning(root, [1, 2, 3, 4]) == (1, 3)
    assert cache.longest_beginning(root, [1, 2]) == (1, 2), "the newer of two"
    assert cache.longest_beginning(root, [2]) == (3, 1)
    assert cache.longest_beginning(root, [3, 2, 3, 4]) == (-1, 0)
    assert cache.longest_beginning(root, []) == (-1, 0)
    assert cache.longest_beginning(root_hash("french"), [1, 2, 3, 4]) == (-1, 0)
    assert cache.longest_beginning(root, [1, 2, 3, 4], excluded=[1]) == (0, 2)
    cache.forget(1)
    assert cache.longest_beginning(root, [1, 2, 3, 4]) == (0, 2)
    cache.check_integrity()


def test_of_many_blocks_that_begin_alike_the_newest_are_compared() -> None:
    cache = PrefixCache()
    root = root_hash("")
    for block in range(5000):
        cache.publish(*contents([1, 2 if block < 2500 else 3, block]), block)
    assert cache.longest_beginning(root, [1, 3, 4998]) == (4998, 3)
    assert cache.longest_beginning(root, [1, 2, 7])[1] == 1


def test_lookups_are_as_fast_among_100_000_blocks() -> None:
    blocks = contents(*([token] for token in range(64)))
    hashes = [content.key for content in blocks]

    def seconds(cache: PrefixCache) -> float:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            assert len(cache.longest_match(hashes)) == 64
            times.append(time.perf_counter() - start)
        return min(times)

    small, large = PrefixCache(), PrefixCache()
    for block, content in enumerate(blocks):
        small.publish(content, block)
        large.publish(content, block)
    for block in range(64, 100_000):
        large.publish(BlockContent.of(block.to_bytes(16, "little"), hashes[0], [7]), block)
    assert seconds(large) < 20 * seconds(small)  # a walk over all of them would be 1500 times
