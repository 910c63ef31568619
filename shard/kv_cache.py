"""The paged KV cache of one rank: its tensors and how large a block is.

Which block belongs to whom is the router's knowledge; this file only holds memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headgate.kernels.huge_pages import map_zeros


@dataclass(frozen=True, slots=True)
class KVCacheLayout:
    """The shape of this rank's KV."""

    num_layers: int
    block_size: int  # positions per block
    num_kv_heads: int  # on this rank
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes on this rank: keys and values of all layers."""
        return bytes_per_block(
            self.num_layers, self.block_size, self.num_kv_heads, self.head_dim, self.dtype
        )


def bytes_per_block(
    num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of one block's keys and values in all layers."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize


class KVCache:
    """Keys and values of `num_blocks` blocks, zero at first.

    Zeros matter: attention may multiply a position that was never written by a weight of
    zero, and only then is a NaN impossible. On a CPU untouched blocks take no real memory.
    """

    def __init__(
        self, layout: KVCacheLayout, num_blocks: int, device: torch.device | str = "cpu"
    ) -> None:
        """Lack of memory raises what PyTorch raises, see memory.is_out_of_memory."""
        self.layout = layout
        self.num_blocks = num_blocks
        # One tensor, so that copying a block is one operation for all layers.
        shape = (
            layout.num_layers,
            2,
            num_blocks,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        )
        if torch.device(device).type == "cpu":
            memory = _untouched_zeros(self.num_bytes)
        else:
            memory = torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        self.data = memory.view(layout.dtype).view(shape)
        # Per layer (k, v), each [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [
            (layer[0], layer[1]) for layer in self.data
        ]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.layout.bytes_per_block

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies block sources[i] onto block targets[i] for each i, all at once. int64[N] each.

        Every source is read before any target is written.
        """
        data = self.data.view(torch.uint8)  # few operations take float8
        data[:, :, targets] = data[:, :, sources]


def _untouched_zeros(num_bytes: int) -> torch.Tensor:
    """uint8[num_bytes] whose pages are the system's zeros until they are written.

    torch.zeros writes them. Raises MemoryError.
    """
    try:
        memory = map_zeros(num_bytes)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no {num_bytes} bytes of memory: {error}") from error
    return torch.frombuffer(memory, dtype=torch.uint8)
