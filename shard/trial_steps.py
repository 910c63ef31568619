"""TrialSteps: steps over random tokens, to try a model with before it serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from headgate.proto.messages import NewRow, RowSampling, StepPlan
from headgate.shard.batch_limits import BatchLimits
from headgate.shard.input_batch import InputBatch
from headgate.shard.kv_cache import KVCache, KVCacheLayout
from headgate.shard.step_inputs import StepInputs, build_inputs

CONTEXT = 32  # positions that a row may have
MOST_TOKENS = 64  # of a step
_ROW_TOKENS = 24  # of a row in the largest step
_ROWS = 4 + -(-MOST_TOKENS // _ROW_TOKENS)
_SEED = 20


class TrialSteps:
    """Some rows with scattered blocks; a step computes the next tokens of some of them."""

    def __init__(self, layout: KVCacheLayout, vocab_size: int) -> None:
        self._layout = layout
        row_blocks = -(-CONTEXT // layout.block_size)
        self._num_blocks = _ROWS * row_blocks
        limits = BatchLimits(
            num_blocks=self._num_blocks,
            block_size=layout.block_size,
            vocab_size=vocab_size,
            max_total_tokens=CONTEXT,
            max_step_tokens=MOST_TOKENS,
            expected_rows=_ROWS,
        )
        random = torch.Generator().manual_seed(_SEED)
        blocks = torch.randperm(self._num_blocks, generator=random).view(_ROWS, -1).tolist()
        size = (_ROWS, CONTEXT - 1)
        prompts = torch.randint(vocab_size, size, generator=random).tolist()
        rows = [
            NewRow(index, prompts[index], RowSampling(max_new_tokens=1), block_ids=blocks[index])
            for index in range(_ROWS)
        ]
        self._batch = InputBatch(limits, ())
        self._batch.apply(StepPlan(epoch=0, sequence=0, new_rows=rows))

    def new_cache(self) -> KVCache:
        """Keys and values for all rows, all zero."""
        return KVCache(self._layout, self._num_blocks)

    def step(self, counts: Mapping[int, int]) -> StepInputs:
        """Inputs of a step of so many tokens by row; the last of each counts as sampled, and all
        others are wanted, too."""
        plan = StepPlan(epoch=0, sequence=0, rows=list(counts), counts=list(counts.values()))
        scheduled = self._batch.apply(plan)
        inputs = build_inputs(self._batch, scheduled, "cpu")
        self._batch.advance(scheduled, np.empty(0, np.int64))
        ends = np.cumsum(scheduled.counts) - 1
        others = np.setdiff1d(np.arange(len(inputs.input_ids)), ends)
        wanted = torch.from_numpy(np.concatenate((ends, others)))
        return replace(inputs, wanted_tokens=wanted, num_samples=len(ends))

    @staticmethod
    def scenario(most: int) -> Iterator[dict[int, int]]:
        """Tokens by row of steps of all kinds, with at most `most` (>= CONTEXT) tokens."""
        yield {0: 6, 1: 1, 2: 9}  # prompts, or the beginnings of some
        yield {2: 1, 0: 1, 1: 1}  # decoding rows
        yield {0: 1, 1: 8, 2: 1, 3: 5}  # both
        yield {3: 1}
        counts, left = {0: 1}, min(most, MOST_TOKENS) - 1
        for row in range(4, _ROWS):
            counts[row] = min(left, _ROW_TOKENS)
            left -= counts[row]
            if not left:
                break
        yield counts
