"""Block tables: admission with hits, publishing, duplicates, forks, and a random walk."""

from __future__ import annotations

import random

import pytest

from headgate.proto.messages import Fork, NewRow, RowSampling, StepPlan
from headgate.router import block_pool
from headgate.router.kv_cache_manager import KVCacheManager
from headgate.router.request import Request
from tests.unit.fake_shard import FakeShard


class Tables:
    """A manager of blocks of 4 tokens, and the requests that hold tables."""

    def __init__(self, num_blocks: int = 16, prefix_caching: bool = True) -> None:
        self.kv = KVCacheManager(num_blocks, 4, prefix_caching)
        self.holders: list[Request] = []

    def request(self, prompt: list[int], **fields: object) -> Request:
        return Request(0, prompt, RowSampling(max_new_tokens=100), **fields)  # type: ignore[arg-type]

    def admit(self, request: Request, confirmed: int | None = None) -> Request:
        """Holds its whole prompt, confirmed as far as told (default: all)."""
        hits = self.kv.match(request)
        assert self.kv.admit(request, hits, request.num_tokens)
        request.num_scheduled = request.num_tokens
        request.num_confirmed = request.num_tokens if confirmed is None else confirmed
        self.kv.publish(request)
        self.holders.append(request)
        self.check()
        return request

    def free(self, request: Request) -> None:
        self.kv.free(request)
        self.holders.remove(request)
        self.check()

    def check(self) -> None:
        self.kv.check_integrity(self.holders)


def ids(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def test_a_prompt_is_found_again_up_to_its_last_full_block() -> None:
    tables = Tables()
    first = tables.admit(tables.request(ids(10)))
    assert tables.kv.match(tables.request(ids(10))) == first.block_ids[:2]
    assert tables.kv.match(tables.request(ids(9, start=1))) == []


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    tables = Tables()
    first = tables.admit(tables.request(ids(8)))
    again = tables.request(ids(8))
    assert tables.kv.match(again) == first.block_ids[:1]
    tables.admit(again)
    assert again.block_ids[0] == first.block_ids[0]
    assert again.block_ids[1] != first.block_ids[1]


def test_hits_are_shared_and_outlive_the_first_holder() -> None:
    tables = Tables()
    first = tables.admit(tables.request(ids(9)))
    second = tables.admit(tables.request(ids(9)))
    tables.free(first)
    assert tables.kv.match(tables.request(ids(9))) == second.block_ids[:2]
    assert tables.kv.num_in_use(second.block_ids) == 3
    tables.free(second)
    assert tables.kv.num_in_use(tables.kv.match(tables.request(ids(9)))) == 0
    assert tables.kv.pool.num_used == 0


def test_only_confirmed_full_blocks_are_published() -> None:
    tables = Tables()
    request = tables.admit(tables.request(ids(12)), confirmed=7)
    assert len(tables.kv.match(tables.request(ids(12)))) == 1
    request.num_confirmed = 12
    assert tables.kv.publish(request) == request.block_ids[1:3]
    assert tables.kv.publish(request) == []
    assert len(tables.kv.match(tables.request(ids(13)))) == 3


def test_blocks_planned_of_known_tokens_are_published_until_withdrawn() -> None:
    tables = Tables()
    request = tables.request(ids(9))
    assert tables.kv.admit(request, [], 13)
    tables.holders.append(request)
    request.num_prefill_tokens, request.num_scheduled = 9, 12  # the last three are to be sampled
    blocks = tables.kv.publish(request)
    assert blocks == request.block_ids[:2] == tables.kv.match(tables.request(ids(9)))
    tables.kv.withdraw(blocks[1:])
    tables.check()
    assert tables.kv.match(tables.request(ids(9))) == blocks[:1]
    tables.free(request)
    assert (tables.kv.pool.num_cached, tables.kv.pool.num_free) == (1, 15)
    tables.kv.withdraw(blocks)
    tables.check()
    assert tables.kv.pool.num_free == 16


def test_a_prompt_takes_over_what_others_have_of_it() -> None:
    tables = Tables()
    slow = tables.admit(tables.request(ids(18)), confirmed=0)
    slow.num_scheduled = 6
    own = slow.block_ids[:]
    assert tables.kv.take_over(slow) == 0
    assert slow.block_ids == own
    fast = tables.admit(tables.request(ids(17)))  # its last block is the last of slow's that counts
    assert tables.kv.take_over(slow) == 16
    assert slow.block_ids == [own[0], *fast.block_ids[1:4]]
    tables.check()
    tables.free(fast)
    tables.free(slow)
    assert tables.kv.pool.num_used == 0


def test_a_block_whose_first_half_is_alike_is_found() -> None:
    tables = Tables()
    first = tables.admit(tables.request(ids(13)))
    other = tables.request([*ids(10), 70, 71, 72, 73])
    assert tables.kv.match(other) == first.block_ids[:2]
    assert tables.kv.match_half(other, 2) == first.block_ids[2]
    assert tables.kv.match_half(other, 2, excluded=first.block_ids) is None
    second = tables.admit(other)
    third = tables.request([*ids(10), 70, 80])
    assert tables.kv.match(third) == first.block_ids[:2]
    assert tables.kv.match_half(third, 2) == second.block_ids[2], "the newer of two"
    assert tables.kv.match_half(tables.request([8, 9, 70]), 0) is None, "another parent's"


def test_the_last_token_is_not_taken_from_the_middle_of_a_block_either() -> None:
    tables = Tables()
    first = tables.admit(tables.request(ids(13)))
    for length, found in ((12, True), (11, True), (10, False), (9, False)):
        request = tables.request(ids(length))
        assert len(tables.kv.match(request)) == 2
        assert tables.kv.match_half(request, 2) == (first.block_ids[2] if found else None)


def test_less_than_half_a_block_is_not_shared() -> None:
    tables = Tables()
    tables.admit(tables.request(ids(9)))
    assert tables.kv.match_half(tables.request([0, 90, 91]), 0) is None


@pytest.mark.parametrize("other", [{"adapter_id": "x"}, {"skip_prefix_cache": True}])
def test_who_finds_no_half_of_a_block(other: dict[str, object]) -> None:
    tables = Tables()
    tables.admit(tables.request(ids(9)))
    request = tables.request(ids(3), **other)
    assert tables.kv.match(request) == []
    assert tables.kv.match_half(request, 0) is None
    assert tables.kv.match_half(tables.request(ids(3)), 0) is not None


def test_generated_tokens_are_cached_too() -> None:
    tables = Tables()
    request = tables.admit(tables.request(ids(6)))
    request.output_ids.extend([50, 51, 52])
    assert tables.kv.extend(request, 8) == []
    request.num_confirmed = 8
    tables.kv.publish(request)
    follow_up = tables.request([*ids(6), 50, 51, 99])
    assert tables.kv.match(follow_up) == request.block_ids[:2]


@pytest.mark.parametrize("other", [{"adapter_id": "x"}, {"skip_prefix_cache": True}])
def test_who_does_not_read_what_others_published(other: dict[str, object]) -> None:
    tables = Tables()
    tables.admit(tables.request(ids(9)))
    assert tables.kv.match(tables.request(ids(9), **other)) == []


def test_prefix_caching_can_be_off() -> None:
    tables = Tables(prefix_caching=False)
    request = tables.admit(tables.request(ids(9)))
    assert tables.kv.match(tables.request(ids(9))) == []
    tables.free(request)
    assert tables.kv.pool.num_cached == 0
    assert request.block_hashes == []


def test_equal_blocks_computed_at_once_do_not_leak() -> None:
    tables = Tables()
    first = tables.admit(tables.request(ids(9)), confirmed=0)
    second = tables.admit(tables.request(ids(9)), confirmed=0)
    for request in (first, second):
        request.num_confirmed = 9
        tables.kv.publish(request)
        tables.check()
    assert tables.kv.match(tables.request(ids(9))) == first.block_ids[:2]
    tables.free(second)
    assert tables.kv.pool.num_cached == 0, "the second's blocks are merely free"
    tables.free(first)
    assert (tables.kv.pool.num_cached, tables.kv.pool.num_free) == (2, 14)


def test_admission_without_enough_blocks_does_nothing() -> None:
    tables = Tables(num_blocks=4)
    first = tables.admit(tables.request(ids(9)))
    second = tables.request(ids(16))
    hits = tables.kv.match(second)
    assert len(hits) == 2
    assert not tables.kv.admit(second, hits, 16)
    tables.check()
    assert tables.kv.extend(first, 17) is None
    tables.free(first)
    # The hits are among the free ones: they count as taken, not as blocks to give out.
    assert tables.kv.admit(second, tables.kv.match(second), 16)
    tables.holders.append(second)
    assert tables.kv.pool.num_available == 0
    tables.check()


def test_eviction_hides_the_tail_before_the_head() -> None:
    tables = Tables(num_blocks=4)
    tables.free(tables.admit(tables.request(ids(13))))
    tables.admit(tables.request(ids(8, start=70)))
    assert len(tables.kv.match(tables.request(ids(13)))) == 2


@pytest.mark.parametrize(("positions", "copied"), [(8, 0), (9, 1), (3, 1)])
def test_fork_shares_full_blocks_and_copies_the_rest(positions: int, copied: int) -> None:
    tables = Tables()
    parent = tables.admit(tables.request(ids(positions)))
    child = tables.request(ids(positions))
    copies = tables.kv.fork(parent, child, positions)
    assert copies is not None
    tables.holders.append(child)
    tables.check()
    full = positions // 4
    assert child.block_ids[:full] == parent.block_ids[:full]
    assert len(child.block_ids) == full + 1  # room for the next position
    assert copies == list(zip(parent.block_ids[full:], child.block_ids[full:], strict=False))
    assert len(copies) == copied
    child.num_confirmed = parent.num_confirmed
    tables.kv.publish(child)
    tables.free(parent)
    tables.free(child)
    assert tables.kv.pool.num_used == 0


@pytest.mark.parametrize("positions", [3, 4, 6])
def test_forks_that_go_on_apart_never_touch_each_others_tokens(positions: int) -> None:
    """Through the fake shard, which compares every position that is attended to."""
    tables, shard = Tables(), FakeShard(16, 4)
    sampling = RowSampling(max_new_tokens=20, temperature=1.0, ignore_eos=True)
    parent, child = tables.request(ids(positions)), tables.request(ids(positions))
    tables.admit(parent)
    row = NewRow(1, parent.prompt_ids, sampling, block_ids=tuple(parent.block_ids))
    shard.execute(StepPlan(1, 1, rows=[1], counts=[positions], new_rows=[row]))
    copies = tables.kv.fork(parent, child, positions)
    assert copies is not None
    forks = [Fork(1, 2, 1, tuple(child.block_ids), positions + 1)]
    for step in range(2, 9):
        block_rows: list[int] = []
        block_ids: list[int] = []
        for number, request in ((1, parent), (2, child)):
            blocks = tables.kv.extend(request, positions + step - 1)
            assert blocks is not None
            block_rows += [number] * len(blocks)
            block_ids += blocks
        plan = StepPlan(
            1,
            step,
            rows=[1, 2],
            counts=[1, 1],
            block_rows=block_rows,
            block_ids=block_ids,
            copies=copies,
            forks=forks,
        )
        assert list(shard.execute(plan).rows) == [1, 2]
        copies, forks = [], []


@pytest.mark.parametrize("positions", [6, 8])
def test_fork_without_a_block_for_the_next_position_does_nothing(positions: int) -> None:
    tables = Tables(num_blocks=2)
    parent = tables.admit(tables.request(ids(positions)))
    child = tables.request(ids(positions))
    assert tables.kv.fork(parent, child, positions) is None
    assert child.block_ids == []
    tables.check()


def test_clear_forgets_content_and_may_change_the_size() -> None:
    tables = Tables()
    tables.free(tables.admit(tables.request(ids(9))))
    tables.kv.clear(5)
    assert tables.kv.match(tables.request(ids(9))) == []
    assert tables.kv.pool.num_free == 5


def test_a_table_goes_on_beside_its_last_block() -> None:
    tables = Tables(num_blocks=512)
    first = tables.admit(tables.request(ids(10)))
    other = tables.admit(tables.request(ids(4, start=50)))
    assert first.block_ids == [0, 1, 2]
    assert other.block_ids == [8]
    assert tables.kv.extend(first, 17) == [3, 4]
    assert tables.kv.extend(other, 8) == [9]
    tables.free(first)
    again = tables.admit(tables.request([*ids(8), *ids(8, start=90)]))
    assert again.block_ids == [0, 1, 2, 3]  # the first two are cached


@pytest.mark.parametrize("fewest_runs", [64, 4])
@pytest.mark.parametrize("seed", range(6))
def test_random_walk(seed: int, fewest_runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests over few tokens, so that prefixes meet; content is checked block by block."""
    monkeypatch.setattr(block_pool, "_FEWEST_RUNS", fewest_runs)
    rng = random.Random(seed)
    tables = Tables(num_blocks=14)
    kv, holders = tables.kv, tables.holders
    content: dict[int, tuple[int, ...]] = {}  # by block: all tokens up to its end, once full
    for _ in range(800):
        action = rng.random()
        if action < 0.35:
            request = tables.request([rng.randrange(2) for _ in range(rng.randrange(1, 17))])
            hits = kv.match(request)
            for index, block in enumerate(hits):
                assert content[block] == tuple(request.prompt_ids[: (index + 1) * 4])
            if kv.admit(request, hits, request.num_tokens):
                request.num_confirmed = len(hits) * 4
                holders.append(request)
        elif action < 0.65 and holders:
            request = rng.choice(holders)
            if request.num_confirmed == request.num_tokens:
                request.output_ids.append(rng.randrange(2))
            if kv.extend(request, request.num_confirmed + 1) is not None:
                request.num_confirmed += 1
                full, rest = divmod(request.num_confirmed, 4)
                if not rest:
                    tokens = tuple(request.token_ids(0, request.num_confirmed))
                    content[request.block_ids[full - 1]] = tokens
                kv.publish(request)
        elif action < 0.75 and holders:
            parent = rng.choice(holders)
            if parent.num_confirmed == parent.num_tokens:
                child = tables.request(list(parent.prompt_ids), output_ids=list(parent.output_ids))
                if kv.fork(parent, child, parent.num_confirmed) is not None:
                    child.num_confirmed = parent.num_confirmed
                    holders.append(child)
        elif holders:
            tables.free(rng.choice(holders))
        tables.check()
    for request in list(holders):
        tables.free(request)
    assert kv.pool.num_used == 0
