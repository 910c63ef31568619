"""Which KV blocks hold which tokens: full ones, by a hash of all tokens up to their end.

Maps content to block numbers and back; lifetimes are block_pool.py's. Also finds blocks that only
begin as is wanted: those of one parent are kept by their first token.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

_DIGEST_BYTES = 16
# Blocks with the same parent and first token that are looked at for the longest beginning.
_MOST_COMPARED = 8


def root_hash(adapter_id: str) -> bytes:
    """The parent of a sequence's first block: KV differs between adapters."""
    return blake2b(adapter_id.encode(), digest_size=_DIGEST_BYTES, person=b"adapter").digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """128 bits over the parent's hash and a block's tokens.

    A cryptographic hash, since a collision, found on purpose or not, would let one client's
    request read another's context.
    """
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


@dataclass(frozen=True, slots=True)
class BlockContent:
    """What a full block holds: its tokens, after those that `parent` stands for."""

    key: bytes  # the hash of both
    parent: bytes
    token_ids: array[int]

    @classmethod
    def of(cls, key: bytes, parent: bytes, token_ids: Sequence[int]) -> BlockContent:
        return cls(key, parent, array("I", token_ids))

    @property
    def place(self) -> tuple[bytes, int]:
        """Among those that may begin alike."""
        return self.parent, self.token_ids[0]

    def num_alike(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens it begins with."""
        count = 0
        for own, other in zip(self.token_ids, token_ids, strict=False):
            if own != other:
                break
            count += 1
        return count


class PrefixCache:
    """Full blocks by hash. One block per content, one content per block."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._contents: dict[int, BlockContent] = {}
        self._alike: dict[tuple[bytes, int], dict[int, None]] = {}  # by `place`; newest last

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._contents

    def longest_match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the leading hashes, up to the first that is not here."""
        blocks = []
        for key in hashes:
            block = self._blocks.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def longest_beginning(
        self, parent: bytes, token_ids: Sequence[int], excluded: Container[int] = ()
    ) -> tuple[int, int]:
        """A block after `parent` that begins with the most of these tokens, and with how many of
        them; (-1, 0) if there is none. Of many only the newest are compared."""
        found, most = -1, 0
        alike = self._alike.get((parent, token_ids[0]), {}) if token_ids else {}
        for block in islice(reversed(alike), _MOST_COMPARED):
            count = self._contents[block].num_alike(token_ids)
            if count > most and block not in excluded:
                found, most = block, count
        return found, most

    def publish(self, content: BlockContent, block: int) -> bool:
        """Makes a full block findable. False: one of the same content is already.

        The first one stays: requests share it by now. A second is an ordinary block that becomes
        free when released. A block shared by forks is published by each of them.
        """
        if content.key in self._blocks:
            return False
        assert block not in self._contents, f"block {block} holds something else already"
        self._blocks[content.key] = block
        self._contents[block] = content
        self._alike.setdefault(content.place, {})[block] = None
        return True

    def forget(self, block: int) -> None:
        """The block is about to hold something else, or never got what it was to hold."""
        content = self._contents.pop(block)
        del self._blocks[content.key]
        alike = self._alike[content.place]
        del alike[block]
        if not alike:
            del self._alike[content.place]

    def blocks(self) -> set[int]:
        """All published blocks."""
        return set(self._contents)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the maps agree."""
        assert len(self._blocks) == len(self._contents)
        for block, content in self._contents.items():
            assert self._blocks[content.key] == block, f"block {block} is listed as another's"
            assert block in self._alike[content.place]
        assert sum(map(len, self._alike.values())) == len(self._contents)
