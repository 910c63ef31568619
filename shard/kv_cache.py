"""The paged KV cache of one rank: its tensors and how large a block is.

Which block belongs to whom is the router's knowledge; this file only holds memory.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from headgate.kernels.huge_pages import HUGE_PAGE, map_zeros, take_pages
from headgate.kernels.int8_cache import SCALE_BYTES, Int8Cache, PagedCache


@dataclass(frozen=True, slots=True)
class KVCacheLayout:
    """The shape of this rank's KV."""

    num_layers: int
    block_size: int  # positions per block
    num_kv_heads: int  # on this rank
    head_dim: int
    dtype: torch.dtype  # floating, or int8

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes on this rank: keys and values of all layers, with scales."""
        head = self.head_dim * self.dtype.itemsize + (SCALE_BYTES if self.scaled else 0)
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * head

    @property
    def scaled(self) -> bool:
        """Whether keys and values are Int8Caches."""
        return self.dtype == torch.int8


class KVCache:
    """Keys and values of `num_blocks` blocks, zero at first.

    Zeros matter: attention may multiply a position that was never written by a weight of
    zero, and only then is a NaN impossible. On a CPU untouched blocks take no real memory, but for
    those that `take_memory` reaches.
    """

    def __init__(
        self, layout: KVCacheLayout, num_blocks: int, device: torch.device | str = "cpu"
    ) -> None:
        """Lack of memory raises what PyTorch raises, see memory.is_out_of_memory."""
        self.layout = layout
        self.num_blocks = num_blocks
        # One tensor, so that copying a block is one operation for all layers.
        positions, heads = layout.block_size, layout.num_kv_heads
        caches = (layout.num_layers, 2, num_blocks)
        self.data = _zeros((*caches, positions, heads, layout.head_dim), layout.dtype, device)
        self.scales: torch.Tensor | None = None
        if layout.scaled:
            self.scales = _zeros((*caches, heads, positions), torch.float32, device)
        # Per layer (k, v), each [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
        self.layers: list[tuple[PagedCache, PagedCache]] = [
            (self._cache(layer, 0), self._cache(layer, 1)) for layer in range(layout.num_layers)
        ]
        self._lock = threading.Lock()
        self._untaken = self._pages()

    def _cache(self, layer: int, which: int) -> PagedCache:
        values = self.data[layer, which]
        return values if self.scales is None else Int8Cache(values, self.scales[layer, which])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds, each [num_layers, 2, num_blocks, ..]."""
        return [self.data] if self.scales is None else [self.data, self.scales]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.layout.bytes_per_block

    def take_memory(self, seconds: float, num_threads: int) -> bool:
        """On a CPU: has the system give memory for blocks before they are written, the first first.

        A step that writes to a new page of every layer at once waits for all of them: for 2 MB of
        zeros each, and in a virtual machine for the host. Stops after `seconds`, however far it is,
        and says whether anything is left; the next call goes on there. What never is taken takes
        memory as it is written.
        """
        deadline = time.monotonic() + seconds
        finished = threading.Event()  # nothing is left, or the system gives no more

        def take() -> None:
            while time.monotonic() < deadline:
                with self._lock:
                    page = next(self._untaken, None)
                if page is None or not take_pages(*page):
                    finished.set()
                    return

        threads = [threading.Thread(target=take) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return not finished.is_set()

    def _pages(self) -> Iterator[tuple[int, int]]:
        """(address, bytes) of a page of each layer's keys and values, then of the next of each."""
        rows = [row for tensor in self.tensors for row in tensor.flatten(0, 1)]
        for offset in range(0, max(row.nbytes for row in rows), HUGE_PAGE):
            for row in rows:
                if (left := row.nbytes - offset) > 0:
                    yield row.data_ptr() + offset, min(left, HUGE_PAGE)

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies block sources[i] onto block targets[i] for each i, all at once. int64[N] each.

        Every source is read before any target is written.
        """
        for tensor in self.tensors:
            data = tensor.flatten(3)
            whole = data.shape[-1] * data.itemsize % 4 == 0
            # Few operations take float8, and four bytes take as long as one.
            data = data.view(torch.int32 if whole else torch.uint8)
            data[:, :, targets] = data[:, :, sources]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type == "cpu":
        memory = _untouched_zeros(size)
    else:
        memory = torch.zeros(size, dtype=torch.uint8, device=device)
    return memory.view(dtype).view(shape)


def _untouched_zeros(num_bytes: int) -> torch.Tensor:
    """uint8[num_bytes] whose pages are the system's zeros until they are written.

    torch.zeros writes them. Raises MemoryError.
    """
    try:
        memory = map_zeros(num_bytes)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no {num_bytes} bytes of memory: {error}") from error
    return torch.frombuffer(memory, dtype=torch.uint8)
