"""Block tables of requests: growing, sharing and giving back, with the prefix cache in between.

The only user of the block pool and the prefix cache. It decides nothing: who gets blocks, and
who must give them up, is the scheduler's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence

from headgate.router.block_pool import BlockPool
from headgate.router.prefix_cache import PrefixCache, block_hash, root_hash
from headgate.router.request import Request


class KVCacheManager:
    """KV memory of one group of shards.

    The shards execute plans strictly in order, and all of a step's rows write a layer's KV before
    one of them reads it. So a block is published as soon as a plan fills it with tokens that are
    known: whoever finds it is computed in that plan or a later one. And blocks that are given back
    may be given out at once, although plans in flight still read and write them: whoever gets them
    is first computed in a later plan, which writes each position before it reads it.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.half_block = max(block_size // 2, 1)
        self._prefix_caching = prefix_caching
        self._cache = PrefixCache()
        self.pool = BlockPool(num_blocks, on_evict=self._cache.forget)

    def clear(self, num_blocks: int | None = None) -> None:
        """Forgets all content, for new shards with as many blocks or `num_blocks`.

        Every table must have been given back.
        """
        assert self.pool.num_used == 0
        self._cache = PrefixCache()
        self.pool = BlockPool(
            self.pool.num_blocks if num_blocks is None else num_blocks, self._cache.forget
        )

    def blocks_for(self, num_positions: int) -> int:
        """Blocks that hold this many positions."""
        return -(-num_positions // self.block_size)

    # ------------------------------------------------------------ prefix cache

    def match(self, request: Request, start: int = 0) -> list[int]:
        """Cached blocks that hold the request's tokens from its block `start` on; takes no
        reference.

        Never the last token: it must be computed for its logits, and into a block of the
        request's own since others may read the cached one.
        """
        if not self._prefix_caching or request.skip_prefix_cache:
            return []
        limit = (request.num_tokens - 1) // self.block_size
        self._hash_blocks(request, limit)
        hashes = request.block_hashes
        return self._cache.longest_match(hashes[index] for index in range(start, limit))

    def match_half(
        self, request: Request, num_blocks: int, excluded: Container[int] = ()
    ) -> int | None:
        """A cached block whose first half holds the next tokens after the request's first
        `num_blocks` blocks, all of them cached.

        The request goes on in a copy of it: that copy must be done by the plan that computes
        the next token, and the block must be computed by an earlier one. `excluded`: those
        that are not. Again never the last token.

        Not token by token: how many were cached, or how long a prompt took, would tell whoever
        tries each next token what another client's prompt has there.
        """
        if not self._prefix_caching or request.skip_prefix_cache:
            return None
        if num_blocks * self.block_size + self.half_block >= request.num_tokens:
            return None
        return self._cache.with_half(self._half_hash(request, num_blocks), excluded)

    def publish(self, request: Request) -> list[int]:
        """Makes its blocks findable by others as far as their content is settled (num_settled).

        Returns those that are full since the last time.
        """
        first, full = request.num_published, request.num_settled // self.block_size
        if full <= first or not self._prefix_caching:
            return []
        self._hash_blocks(request, full)
        blocks = request.block_ids[first:full]
        for index, block in enumerate(blocks, first):
            half = self._half_hash(request, index)
            if self._cache.publish(request.block_hashes[index], half, block):
                self.pool.retain(block)
        request.num_published = full
        return blocks

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Hides those of these blocks that are published: nothing will be computed into them."""
        for block in blocks:
            if block in self._cache:
                self._cache.forget(block)
                self.pool.discard(block)

    def _hash_blocks(self, request: Request, count: int) -> None:
        """Extends the request's chain of hashes to its first `count` blocks, each hashed once."""
        hashes, size = request.block_hashes, self.block_size
        for index in range(len(hashes), count):
            token_ids = request.token_ids(index * size, (index + 1) * size)
            hashes.append(block_hash(self._parent(request, index), token_ids))

    def _parent(self, request: Request, index: int) -> bytes:
        """The hash of all before its block `index`; that before is hashed."""
        return request.block_hashes[index - 1] if index else root_hash(request.adapter_id)

    def _half_hash(self, request: Request, index: int) -> bytes:
        """Of all up to the middle of its block `index`; what is before the block is hashed."""
        start = index * self.block_size
        token_ids = request.token_ids(start, start + self.half_block)
        return block_hash(self._parent(request, index), token_ids)

    # ------------------------------------------------------------ block tables

    def num_in_use(self, blocks: Sequence[int]) -> int:
        """How many of these cached blocks are held by a request already: sharing those is free."""
        return sum(1 for block in blocks if self.pool.ref_count(block))

    def admit(self, request: Request, hits: Sequence[int], num_positions: int) -> bool:
        """Gives it a block table of `hits` (from `match`) and new blocks, for `num_positions`.

        A block from `match_half` may be among the new ones: plans copy before they compute.

        False, and nothing done, if there are too few blocks.
        """
        assert not request.block_ids
        new = self.blocks_for(num_positions) - len(hits)
        if new + len(hits) - self.num_in_use(hits) > self.pool.num_available:
            return False
        for block in hits:
            self.pool.share(block)
        blocks = self.pool.allocate(new, hits[-1] if hits else None)
        assert blocks is not None
        request.block_ids = [*hits, *blocks]
        request.num_published = len(hits)
        return True

    def extend(self, request: Request, num_positions: int) -> list[int] | None:
        """Grows its table to hold `num_positions`; the new blocks, or None if there are too few."""
        missing = self.blocks_for(num_positions) - len(request.block_ids)
        if missing <= 0:
            return []
        last = request.block_ids[-1] if request.block_ids else None
        blocks = self.pool.allocate(missing, last)
        if blocks is not None:
            request.block_ids.extend(blocks)
        return blocks

    def take_over(self, request: Request) -> int:
        """Has its table go on with the cached blocks that hold the tokens it is to compute next.

        They take the place of its own there, the one in part filled included. Returns how far its
        blocks are computed or planned then, in positions; 0, and nothing done, if there are none.
        """
        start = request.num_scheduled // self.block_size
        hits = self.match(request, start)
        if not hits:
            return 0
        for block in hits:
            self.pool.share(block)
        self.pool.release(request.block_ids[start:])
        request.block_ids[start:] = hits
        request.num_published = len(request.block_ids)
        return len(request.block_ids) * self.block_size

    def fork(
        self, parent: Request, child: Request, num_positions: int
    ) -> list[tuple[int, int]] | None:
        """Gives `child` a table with the parent's first `num_positions`, all planned before, and
        room for one more.

        Full blocks are shared. A block in part filled is copied, since both would write
        into it: that copy, as (from, to), must be done by the plan that forks. None, and nothing
        done, if no block is left.
        """
        assert not child.block_ids
        own = self.pool.allocate(1)
        if own is None:
            return None
        full, rest = divmod(num_positions, self.block_size)
        for block in parent.block_ids[:full]:
            self.pool.share(block)
        child.block_ids = [*parent.block_ids[:full], *own]
        child.block_hashes = parent.block_hashes[:full]
        child.num_published = min(parent.num_published, full)
        return [(parent.block_ids[full], own[0])] if rest else []

    def free(self, request: Request) -> None:
        """Gives back its whole table; published blocks stay findable until evicted."""
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_published = 0

    def check_integrity(self, holders: Iterable[Request]) -> None:
        """Raises AssertionError unless references equal what these requests' tables hold."""
        self.pool.check_integrity()
        self._cache.check_integrity()
        held = Counter(block for request in holders for block in request.block_ids)
        for block in range(self.pool.num_blocks):
            count = self.pool.ref_count(block)
            assert count == held[block], f"block {block}: {count} references, {held[block]} holders"
        assert self._cache.blocks() == self.pool.retained(), "published and retained blocks differ"
