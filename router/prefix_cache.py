"""Which KV blocks hold which tokens: full ones, by a hash of all tokens up to their end.

Maps content to block numbers and back; lifetimes are block_pool.py's. Also finds blocks of which
only the first half is as wanted, by a hash of all tokens up to there.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Sequence
from hashlib import blake2b
from itertools import islice

_DIGEST_BYTES = 16
# Blocks with the same first half that are looked at, at most, for one that is not excluded.
_MOST_TRIED = 8


def root_hash(adapter_id: str) -> bytes:
    """The parent of a sequence's first block: KV differs between adapters."""
    return blake2b(adapter_id.encode(), digest_size=_DIGEST_BYTES, person=b"adapter").digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """128 bits over the parent's hash and a block's tokens.

    A cryptographic hash, since a collision, found on purpose or not, would let one client's
    request read another's context.
    """
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


class PrefixCache:
    """Full blocks by hash. One block per content, one content per block."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, tuple[bytes, bytes]] = {}  # of the whole block, of its first half
        self._halves: dict[bytes, dict[int, None]] = {}  # blocks by first half, the newest last

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._hashes

    def longest_match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the leading hashes, up to the first that is not here."""
        blocks = []
        for key in hashes:
            block = self._blocks.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def with_half(self, half: bytes, excluded: Container[int] = ()) -> int | None:
        """A block whose first half has this hash, the newest that is not excluded."""
        blocks = islice(reversed(self._halves.get(half, {})), _MOST_TRIED)
        return next((block for block in blocks if block not in excluded), None)

    def publish(self, key: bytes, half: bytes, block: int) -> bool:
        """Makes a full block findable, also by its first half. False: one of the same content is
        already.

        The first one stays: requests share it by now. A second is an ordinary block that becomes
        free when released. A block shared by forks is published by each of them.
        """
        if key in self._blocks:
            return False
        assert block not in self._hashes, f"block {block} holds something else already"
        self._blocks[key] = block
        self._hashes[block] = key, half
        self._halves.setdefault(half, {})[block] = None
        return True

    def forget(self, block: int) -> None:
        """The block is about to hold something else, or never got what it was to hold."""
        key, half = self._hashes.pop(block)
        del self._blocks[key]
        del self._halves[half][block]
        if not self._halves[half]:
            del self._halves[half]

    def blocks(self) -> set[int]:
        """All published blocks."""
        return set(self._hashes)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the maps agree."""
        assert len(self._blocks) == len(self._hashes) == sum(map(len, self._halves.values()))
        for block, (key, half) in self._hashes.items():
            assert self._blocks[key] == block, f"block {block} is listed under another's hash"
            assert block in self._halves[half]
