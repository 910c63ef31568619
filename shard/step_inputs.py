"""From an InputBatch's rows to the tensors of one forward pass. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from headgate.proto.messages import Pooling
from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.input_batch import InputBatch
from headgate.shard.sampling.params import IntArray
from headgate.shard.scheduled_rows import ScheduledRows


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Prompt positions of one row that are computed in this step and predict a known token."""

    row_id: int
    first: int  # place of the first of them in wanted_tokens
    top_n: int  # alternatives asked for
    start: int  # position of the first token predicted (>= 1)
    targets: IntArray  # int64[n]: the tokens predicted, one per position


@dataclass(frozen=True, slots=True)
class PooledChunk:
    """Prompt positions of one pooled row whose hidden states count."""

    row_id: int
    first: int  # place of the first of them in wanted_tokens
    start: int  # its position in the prompt
    stop: int  # the position after the last of them


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """T tokens of R rows."""

    input_ids: torch.Tensor  # int64[T]
    positions: torch.Tensor  # int64[T]
    attention: AttentionMetadata
    wanted_tokens: torch.Tensor  # int64[W]: index of each whose hidden state is asked for
    num_samples: int  # a token is drawn after each of the first so many of these
    plain: bool  # and no row asks for more than the likeliest ones
    prompt_chunks: tuple[PromptChunk, ...]
    pooled_chunks: tuple[PooledChunk, ...]


class _WantedTokens:
    """StepInputs.wanted_tokens as they are collected."""

    def __init__(self, before_draws: IntArray) -> None:
        self._parts = [before_draws]
        self._count = len(before_draws)

    def add(self, first: int, count: int) -> int:
        """`count` tokens from index `first` on; returns the place of that one."""
        place = self._count
        self._parts.append(np.arange(first, first + count))
        self._count += count
        return place

    def indices(self) -> IntArray:
        return np.concatenate(self._parts) if len(self._parts) > 1 else self._parts[0]


def build_inputs(
    batch: InputBatch, scheduled: ScheduledRows, device: torch.device | str
) -> StepInputs:
    """The inputs of a step that computes the `scheduled` rows; at least one."""
    slots, counts = scheduled.slots, scheduled.lengths
    computed = batch.num_computed[slots]
    ends = np.cumsum(counts)
    plain = bool(batch.plain[slots].all())
    # For every token of the step: its row's slot, and its position there.
    token_slots, positions = slots, computed
    if ends[-1] > len(slots):
        token_slots = np.repeat(slots, counts)
        positions = np.arange(ends[-1]) + np.repeat(computed - (ends - counts), counts)
    draws = scheduled.samples
    if not plain:
        draws = draws & (batch.params["pooling"][slots] == Pooling.NONE)
    before_draws = ends[draws] - 1
    if scheduled.drafts.any():  # a row's last known token and its guesses
        firsts = ends - 1 - scheduled.drafts
        spans = [np.arange(firsts[row], ends[row]) for row in np.flatnonzero(draws)]
        before_draws = np.concatenate(spans)
    wanted = _WantedTokens(before_draws)
    prompt_chunks = () if plain else _prompt_chunks(batch, scheduled, ends - counts, wanted)
    pooled_chunks = () if plain else _pooled_chunks(batch, scheduled, ends, wanted)
    return StepInputs(
        input_ids=_tensor(batch.token_ids[token_slots, positions].astype(np.int64), device),
        positions=_tensor(positions, device),
        attention=_attention(batch, scheduled, token_slots, positions, device),
        wanted_tokens=_tensor(wanted.indices(), device),
        num_samples=len(before_draws),
        plain=plain,
        prompt_chunks=prompt_chunks,
        pooled_chunks=pooled_chunks,
    )


def _attention(
    batch: InputBatch,
    scheduled: ScheduledRows,
    token_slots: IntArray,
    positions: IntArray,
    device: torch.device | str,
) -> AttentionMetadata:
    slots, counts = scheduled.slots, scheduled.lengths
    block_size = batch.limits.block_size
    blocks, offsets = np.divmod(positions, block_size)
    slot_mapping = batch.block_tables[token_slots, blocks].astype(np.int64) * block_size + offsets
    context_lens = batch.num_computed[slots] + counts
    max_context_len = int(context_lens.max())
    max_blocks = -(-max_context_len // block_size)
    cu_query_lens = np.zeros(len(slots) + 1, np.int32)
    np.cumsum(counts, out=cu_query_lens[1:])
    return AttentionMetadata(
        cu_query_lens=_tensor(cu_query_lens, device),
        context_lens=_tensor(context_lens.astype(np.int32), device),
        block_tables=_tensor(batch.block_tables[slots, :max_blocks], device),
        slot_mapping=_tensor(slot_mapping, device),
        max_query_len=int(counts.max()),
        max_context_len=max_context_len,
    )


def _prompt_chunks(
    batch: InputBatch, scheduled: ScheduledRows, starts: IntArray, tokens: _WantedTokens
) -> tuple[PromptChunk, ...]:
    wanted = np.flatnonzero(batch.params["prompt_logprobs"][scheduled.slots])
    chunks = []
    for row in wanted.tolist():
        slot = int(scheduled.slots[row])
        start = int(batch.num_computed[slot])
        # The prompt's last position predicts the first output token, which is sampled instead.
        end = min(start + int(scheduled.counts[row]), int(batch.num_prompt[slot]) - 1)
        if end <= start:
            continue
        chunks.append(
            PromptChunk(
                row_id=int(batch.ids[slot]),
                first=tokens.add(int(starts[row]), end - start),
                top_n=int(batch.params["prompt_top_n_tokens"][slot]),
                start=start + 1,
                targets=batch.token_ids[slot, start + 1 : end + 1].astype(np.int64),
            )
        )
    return tuple(chunks)


def _pooled_chunks(
    batch: InputBatch, scheduled: ScheduledRows, ends: IntArray, tokens: _WantedTokens
) -> tuple[PooledChunk, ...]:
    kinds = batch.params["pooling"][scheduled.slots]
    chunks = []
    for row in np.flatnonzero(kinds != Pooling.NONE).tolist():
        slot, count = int(scheduled.slots[row]), int(scheduled.counts[row])
        stop = int(batch.num_computed[slot]) + count
        if kinds[row] == Pooling.LAST:
            if not scheduled.samples[row]:
                continue  # the last position is yet to come
            count = 1
        chunks.append(
            PooledChunk(
                row_id=int(batch.ids[slot]),
                first=tokens.add(int(ends[row]) - count, count),
                start=stop - count,
                stop=stop,
            )
        )
    return tuple(chunks)


def _tensor(values: npt.NDArray[np.generic], device: torch.device | str) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device == "cpu" else tensor.to(device, non_blocking=True)
