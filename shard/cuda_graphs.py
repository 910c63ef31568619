"""GraphedModel: decode steps on a GPU as CUDA graphs, by padded number of rows and context.

A step in which every row has one token fills buffers whose addresses stay, by two asynchronous
copies from pinned memory, and replays the graph captured for its size: nothing is allocated and the
host waits for nothing. A size is captured when it first occurs; of the graphs only those used last
are kept. Other steps get their inputs by one such copy and run as they are. Tokens that the host
does not know yet are those of the step before, see LastTokens.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.device import Device
from headgate.shard.kv_cache import KVCache
from headgate.shard.last_tokens import LastTokens
from headgate.shard.models.base import CausalLM
from headgate.shard.staging import Staging
from headgate.shard.step_inputs import StepInputs

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256  # that the Triton attention takes
_COLUMNS = 4  # of the staging buffer: ids, positions, slots, context lengths
_NO_SLOT = -1  # where a row that is only padding writes: nowhere
# Steps with prompts have so many tokens, or a multiple, or a half or a quarter: whenever a product
# comes with a number of rows that it has not had yet, cuBLAS looks for the fastest kernel, which
# takes longer than many a prompt.
_PADDED_TOKENS = 64
_SMALLEST_REACH = 512  # positions
MOST_GRAPHS = 64  # kept at once


Graph = tuple[Callable[[], None], torch.Tensor]  # (replays it, where its result is)

_NONE = torch.zeros(0, dtype=torch.int64)
_NO_STEP = StepInputs(
    input_ids=_NONE,
    positions=_NONE,
    attention=AttentionMetadata(
        cu_query_lens=torch.zeros(1, dtype=torch.int32),
        context_lens=_NONE.int(),
        block_tables=torch.zeros((0, 0), dtype=torch.int32),
        slot_mapping=_NONE,
        max_query_len=1,
        max_context_len=1,
    ),
    wanted_tokens=_NONE,
    num_samples=0,
    plain=False,
    prompt_chunks=(),
    pooled_chunks=(),
)


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """The largest step."""

    tokens: int
    row_blocks: int  # KV blocks of a row


class GraphedModel:
    """Computes what the model's `forward` and `logits` do, from inputs in the host's memory."""

    def __init__(
        self, model: CausalLM, device: Device, sizes: Sequence[int], limits: GraphLimits
    ) -> None:
        """sizes: rows of the steps to be captured, ascending; none: no step is."""
        self._model = model
        self._device = device
        self.sizes = sizes
        self.staging = Staging(device)
        self.last_tokens = LastTokens(device, limits.tokens)
        max_rows, max_blocks = max(sizes, default=1), limits.row_blocks
        # Columns first, then tables; on the host in the same order.
        self._columns = device.zeros(_COLUMNS, max_rows, dtype=torch.int64)
        self._tables = device.zeros(max_rows, max_blocks, dtype=torch.int32)
        # Of two steps in turn, see Staging.
        self._host_columns = device.pinned(2, _COLUMNS, max_rows, dtype=torch.int64)
        self._host_tables = device.pinned(2, max_rows, max_blocks, dtype=torch.int32)
        (starts,) = self.staging.upload([np.arange(max_rows + 1, dtype=np.int32)])
        self._starts = starts.clone()
        self._numbers = np.arange(max_rows)
        self._cache: KVCache | None = None
        self._graphs: dict[tuple[int, int], Graph] = {}

    def bind(self, kv_cache: KVCache) -> None:
        """From now on steps use this cache; graphs of the one before are dropped."""
        self._cache = kv_cache
        self.drop_graphs()

    def release(self) -> None:
        """Lets the cache and the graphs go."""
        self._cache = None
        self.drop_graphs()

    def drop_graphs(self) -> None:
        self._graphs.clear()

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Normed hidden states of the wanted tokens [W, hidden_size], valid until the next step."""
        assert self._cache is not None, "bind comes first"
        self._model.check_lengths(inputs.attention)
        rows = len(inputs.attention.context_lens)
        if inputs.attention.max_query_len > 1 or rows > max(self.sizes, default=0):
            placed = self._on_device(inputs)
            return self._compute(placed, placed.wanted_tokens)[: len(inputs.wanted_tokens)]
        hidden, wanted = self._replay(inputs, rows), inputs.wanted_tokens.numpy()
        if np.array_equal(wanted, self._numbers[:rows]):
            return hidden
        return hidden.index_select(0, *self.staging.upload([wanted]))

    @property
    def num_possible(self) -> int:
        """Graphs that may be kept at once."""
        reaches = {reach_of(1 << n, self._model.max_positions) for n in range(32)}
        return min(MOST_GRAPHS, len(self.sizes) * len(reaches))

    def _replay(self, inputs: StepInputs, rows: int) -> torch.Tensor:
        padded = self.sizes[bisect_left(self.sizes, rows)]
        reach = reach_of(inputs.attention.max_context_len, self._model.max_positions)
        self._fill(inputs, rows, padded)
        self._model.heartbeat()
        graph = self._graphs.pop((padded, reach), None)
        if graph is None:
            graph = self._captured(padded, reach)
        else:
            graph[0]()
        self._graphs[padded, reach] = graph
        return graph[1][:rows]

    def _captured(self, padded: int, reach: int) -> Graph:
        """Computes the step that is in the buffers, too."""
        if len(self._graphs) >= MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]  # unused for longest
        static = self._static_inputs(padded, reach)
        graph = self._device.capture(lambda: self._compute(static))
        fields = {"rows": padded, "positions": reach, "graphs": len(self._graphs) + 1}
        logger.info("decode step captured", extra={"fields": fields})
        return graph

    def capture(self, padded: int) -> None:
        """The graph of so many rows, with contexts as long as can be: to see what it takes."""
        with torch.inference_mode():
            self._fill(_NO_STEP, 0, padded)
            reach = reach_of(self._model.max_positions, self._model.max_positions)
            self._graphs[padded, reach] = self._captured(padded, reach)

    def _fill(self, inputs: StepInputs, rows: int, padded: int) -> None:
        """The step's inputs, and padding that writes nowhere and attends to one position."""
        attention, host = inputs.attention, self._host_columns[self.staging.turn]
        sources = (
            inputs.input_ids,
            inputs.positions,
            attention.slot_mapping,
            attention.context_lens,
        )
        for column, source, neutral in zip(host, sources, (0, 0, _NO_SLOT, 1), strict=True):
            column[:rows].copy_(source)
            column[rows:padded].fill_(neutral)
        tables = self._host_tables[self.staging.turn, :padded]
        tables[:rows, : attention.block_tables.shape[1]].copy_(attention.block_tables)
        tables[rows:].zero_()
        self._device.upload(self._columns, host)
        self._device.upload(self._tables[:padded], tables)

    def _static_inputs(self, padded: int, reach: int) -> StepInputs:
        ids, positions, slots, _ = (column[:padded] for column in self._columns)
        attention = AttentionMetadata(
            cu_query_lens=self._starts[: padded + 1],
            context_lens=self._columns[3, :padded],
            block_tables=self._tables[:padded],
            slot_mapping=slots,
            max_query_len=1,
            max_context_len=reach,
        )
        return StepInputs(ids, positions, attention, ids[:0], 0, False, (), ())

    def _compute(self, inputs: StepInputs, wanted: torch.Tensor | None = None) -> torch.Tensor:
        assert self._cache is not None
        attention = inputs.attention
        if attention.context_lens.dtype != torch.int32:
            attention = replace(attention, context_lens=attention.context_lens.int())
        ids = self.last_tokens.resolve(inputs.input_ids)
        return self._model.forward(ids, inputs.positions, self._cache, attention, wanted)

    def _on_device(self, inputs: StepInputs) -> StepInputs:
        inputs = _padded(inputs)
        attention = inputs.attention
        tensors = (
            inputs.input_ids,
            inputs.positions,
            attention.slot_mapping,
            attention.cu_query_lens,
            attention.context_lens,
            attention.block_tables,
            inputs.wanted_tokens,
        )
        ids, positions, slots, starts, contexts, tables, wanted = self.staging.upload(
            [tensor.numpy() for tensor in tensors]
        )
        placed = replace(
            attention,
            slot_mapping=slots,
            cu_query_lens=starts,
            context_lens=contexts,
            block_tables=tables,
        )
        return replace(
            inputs, input_ids=ids, positions=positions, attention=placed, wanted_tokens=wanted
        )


def padded_tokens(tokens: int) -> int:
    """Tokens of a step with a prompt, once it is filled up."""
    whole = _PADDED_TOKENS
    return next(
        (size for size in (whole // 4, whole // 2) if tokens <= size), -(-tokens // whole) * whole
    )


def _padded(inputs: StepInputs) -> StepInputs:
    """With a row more that fills the step up, where rows have several tokens. It writes nowhere,
    and attends to whatever its blocks hold. The first token is wanted until these are as many."""
    surplus = padded_tokens(len(inputs.wanted_tokens)) - len(inputs.wanted_tokens)
    inputs = replace(inputs, wanted_tokens=F.pad(inputs.wanted_tokens, (0, surplus)))
    attention = inputs.attention
    fill = padded_tokens(len(inputs.input_ids)) - len(inputs.input_ids)
    if attention.max_query_len == 1 or not fill:
        return inputs
    missing = _PADDED_TOKENS - attention.block_tables.shape[1]  # blocks are a position at least
    return replace(
        inputs,
        input_ids=F.pad(inputs.input_ids, (0, fill)),
        positions=F.pad(inputs.positions, (0, fill)),
        attention=replace(
            attention,
            cu_query_lens=F.pad(
                attention.cu_query_lens, (0, 1), value=len(inputs.input_ids) + fill
            ),
            context_lens=F.pad(attention.context_lens, (0, 1), value=fill),
            block_tables=F.pad(attention.block_tables, (0, max(missing, 0), 0, 1)),
            slot_mapping=F.pad(attention.slot_mapping, (0, fill), value=_NO_SLOT),
            max_query_len=max(attention.max_query_len, fill),
            max_context_len=max(attention.max_context_len, fill),
        ),
    )


def usual_sizes(most: int) -> list[int]:
    """Powers of two up to 8, then multiples of 8; the last is `most`."""
    sizes = [1, 2, 4, *range(8, most, 8)]
    return [*(size for size in sizes if size < most), most]


def reach_of(context: int, most: int) -> int:
    """The longest context that the graph for `context` takes: a power of two from 512 on."""
    return min(max(_SMALLEST_REACH, 1 << (context - 1).bit_length()), most)
