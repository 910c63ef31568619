"""Which KV blocks hold which tokens: full ones, by a hash of all tokens up to their end.

Maps content to block numbers and back; lifetimes are block_pool.py's.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_DIGEST_BYTES = 16


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
        self._hashes: dict[int, bytes] = {}

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

    def publish(self, key: bytes, block: int) -> bool:
        """Makes a full block findable. False: one of the same content is already.

        The first one stays: requests share it by now. A second is an ordinary block that becomes
        free when released. A block shared by forks is published by each of them.
        """
        if key in self._blocks:
            return False
        assert block not in self._hashes, f"block {block} holds something else already"
        self._blocks[key] = block
        self._hashes[block] = key
        return True

    def forget(self, block: int) -> None:
        """The block is about to hold something else, or never got what it was to hold."""
        del self._blocks[self._hashes.pop(block)]

    def blocks(self) -> set[int]:
        """All published blocks."""
        return set(self._hashes)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the two maps are each other's inverse."""
        assert len(self._blocks) == len(self._hashes)
        for block, key in self._hashes.items():
            assert self._blocks[key] == block, f"block {block} is listed under another's hash"
