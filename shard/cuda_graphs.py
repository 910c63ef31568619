"""GraphedModel: decode steps on a GPU as CUDA graphs, by padded number of rows and context.

A step in which every row has one token fills buffers whose addresses stay, by two asynchronous
copies from pinned memory, and replays the graph captured for its size: nothing is allocated and the
host waits for nothing. A size is captured when it first occurs. Other steps run as they are. The
step before must have ended, that is, its tokens must have been fetched.

All calls to CUDA are in CudaDevice; tests put another in its place.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.kv_cache import KVCache
from headgate.shard.models.base import CausalLM
from headgate.shard.step_inputs import StepInputs

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256  # that the Triton attention takes
_COLUMNS = 4  # of the staging buffer: ids, positions, slots, context lengths
_NO_SLOT = -1  # where a row that is only padding writes: nowhere
_SMALLEST_REACH = 512  # positions


class Device(Protocol):
    """What graphs need of CUDA."""

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that the device can read by itself."""

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies to the device; returns before it is done where the source is pinned."""

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """(replays what `run` does, its result's place). Computes it once, too."""


class CudaDevice:
    """The current GPU."""

    def __init__(self) -> None:
        self._pool: Any = None  # memory that all graphs share

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        run()  # so that kernels are compiled and libraries have made their workspaces
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        self._pool = graph.pool()
        graph.replay()
        return graph.replay, result


class GraphedModel:
    """Computes what the model's `forward` and `logits` do, from inputs in the host's memory."""

    def __init__(
        self, model: CausalLM, device: Device, sizes: Sequence[int], max_blocks: int
    ) -> None:
        """sizes: rows of the steps to be captured, ascending; max_blocks: of a row's KV."""
        self._model = model
        self._device = device
        self._sizes = sizes
        max_rows = sizes[-1]
        # Columns first, then tables; on the host in the same order.
        self._columns = device.zeros(_COLUMNS, max_rows, dtype=torch.int64)
        self._tables = device.zeros(max_rows, max_blocks, dtype=torch.int32)
        self._host_columns = device.pinned(_COLUMNS, max_rows, dtype=torch.int64)
        self._host_tables = device.pinned(max_rows, max_blocks, dtype=torch.int32)
        self._starts = device.zeros(max_rows + 1, dtype=torch.int32)
        device.upload(self._starts, torch.arange(max_rows + 1, dtype=torch.int32))
        self._cache: KVCache | None = None
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], torch.Tensor]] = {}
        self._hidden: torch.Tensor | None = None

    def bind(self, kv_cache: KVCache) -> None:
        """From now on steps use this cache; graphs of the one before are dropped."""
        self._cache = kv_cache
        self._graphs.clear()

    def release(self) -> None:
        """Lets the cache and the graphs go."""
        self._cache = self._hidden = None
        self._graphs.clear()

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Normed hidden states [T, hidden_size], valid until the next step."""
        assert self._cache is not None, "bind comes first"
        self._model.check_lengths(inputs.attention)
        rows = len(inputs.attention.context_lens)
        if inputs.attention.max_query_len > 1 or rows > self._sizes[-1]:
            self._hidden = self._compute(_on_device(inputs, self._columns.device))
        else:
            self._hidden = self._replay(inputs, rows)
        return self._hidden

    def logits(self, sample_tokens: torch.Tensor) -> torch.Tensor | None:
        """Of the last step's tokens with these indices: the model's."""
        assert self._hidden is not None, "forward comes first"
        rows = sample_tokens.to(self._hidden.device, non_blocking=True)
        return self._model.logits(self._hidden[rows])

    def _replay(self, inputs: StepInputs, rows: int) -> torch.Tensor:
        padded = self._sizes[bisect_left(self._sizes, rows)]
        reach = reach_of(inputs.attention.max_context_len, self._model.max_positions)
        self._fill(inputs, rows, padded)
        self._model.heartbeat()
        if (padded, reach) in self._graphs:
            replay, hidden = self._graphs[padded, reach]
            replay()
            return hidden[:rows]
        static = self._static_inputs(inputs, padded, reach)
        graph = self._device.capture(lambda: self._compute(static))
        self._graphs[padded, reach] = graph
        fields = {"rows": padded, "positions": reach, "graphs": len(self._graphs)}
        logger.info("decode step captured", extra={"fields": fields})
        return graph[1][:rows]

    def _fill(self, inputs: StepInputs, rows: int, padded: int) -> None:
        """The step's inputs, and padding that writes nowhere and attends to one position."""
        attention, host = inputs.attention, self._host_columns
        sources = (
            inputs.input_ids,
            inputs.positions,
            attention.slot_mapping,
            attention.context_lens,
        )
        for column, source, neutral in zip(host, sources, (0, 0, _NO_SLOT, 1), strict=True):
            column[:rows].copy_(source)
            column[rows:padded].fill_(neutral)
        tables = self._host_tables[:padded]
        tables[:rows, : attention.block_tables.shape[1]].copy_(attention.block_tables)
        tables[rows:].zero_()
        self._device.upload(self._columns, host)
        self._device.upload(self._tables[:padded], tables)

    def _static_inputs(self, inputs: StepInputs, padded: int, reach: int) -> StepInputs:
        ids, positions, slots, _ = (column[:padded] for column in self._columns)
        return replace(
            inputs,
            input_ids=ids,
            positions=positions,
            attention=AttentionMetadata(
                cu_query_lens=self._starts[: padded + 1],
                context_lens=self._columns[3, :padded],
                block_tables=self._tables[:padded],
                slot_mapping=slots,
                max_query_len=1,
                max_context_len=reach,
            ),
        )

    def _compute(self, inputs: StepInputs) -> torch.Tensor:
        assert self._cache is not None
        attention = inputs.attention
        if attention.context_lens.dtype != torch.int32:
            attention = replace(attention, context_lens=attention.context_lens.int())
        return self._model.forward(inputs.input_ids, inputs.positions, self._cache, attention)


def usual_sizes(most: int) -> list[int]:
    """Powers of two up to 8, then multiples of 8; the last is `most`."""
    sizes = [1, 2, 4, *range(8, most, 8)]
    return [*(size for size in sizes if size < most), most]


def reach_of(context: int, most: int) -> int:
    """The longest context that the graph for `context` takes: a power of two from 512 on."""
    return min(max(_SMALLEST_REACH, 1 << (context - 1).bit_length()), most)


def _on_device(inputs: StepInputs, device: torch.device) -> StepInputs:
    attention = inputs.attention
    return replace(
        inputs,
        input_ids=inputs.input_ids.to(device, non_blocking=True),
        positions=inputs.positions.to(device, non_blocking=True),
        attention=replace(
            attention,
            cu_query_lens=attention.cu_query_lens.to(device, non_blocking=True),
            context_lens=attention.context_lens.to(device, non_blocking=True),
            block_tables=attention.block_tables.to(device, non_blocking=True),
            slot_mapping=attention.slot_mapping.to(device, non_blocking=True),
        ),
    )
