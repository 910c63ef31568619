"""RecordedModel: a model's steps as recorded calls on planned buffers, replayed without Python.

The CPU's counterpart of a CUDA graph, but not tied to a batch size: one recording serves steps of
any number of tokens and rows. Whether a model can be recorded is not asked but tried, before
serving: it is recorded on small steps, and then replays of other steps must give the very bits that
the model gives. Models that compute with torch's own operations don't pass, and run as they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from headgate.kernels import ops
from headgate.kernels.cpu.program import Program
from headgate.kernels.cpu.recording import NotRecordable, Recording
from headgate.shard import trial_steps
from headgate.shard.distributed import Group
from headgate.shard.kv_cache import KVCache, KVCacheLayout
from headgate.shard.models.base import CausalLM
from headgate.shard.step_inputs import StepInputs
from headgate.shard.trial_steps import TrialSteps

logger = logging.getLogger(__name__)

# Tokens of each row in the recordings: of the first, with a token more, with a row more. For logits
# it is the number of rows.
_RECORDED_STEPS = ({0: 3, 1: 1}, {0: 4, 1: 1}, {0: 2, 1: 1, 2: 1})
_RECORDED_LOGITS = (2, 3)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step."""

    tokens: int
    context: int  # positions of the longest row
    logits_rows: int  # rows that get logits at once


class RecordedModel:
    """Computes what the model's `forward` and `logits` do. Made by `record_model`."""

    def __init__(
        self, model: CausalLM, inputs: _StepBuffers, forward: Program, head: Program, beats: int
    ) -> None:
        assert forward.output is not None, "hidden states are a tensor"
        self._hidden = forward.output
        self._model = model
        self._inputs = inputs
        self._forward = forward
        self._head = head
        self._beats = beats

    def bind(self, kv_cache: KVCache) -> None:
        """From now on steps use this cache, of the layout it was recorded with."""
        self._forward.bind([tensor.data_ptr() for tensor in _tensors(kv_cache)])

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Normed hidden states [T, hidden_size], valid until the next step."""
        self._model.check_lengths(inputs.attention)
        self._inputs.fill(inputs)
        tokens, rows = len(inputs.input_ids), len(inputs.attention.context_lens)
        self._forward.run((tokens, rows), self._beats)
        return self._hidden[:tokens]

    def logits(self, sample_tokens: torch.Tensor) -> torch.Tensor | None:
        """Of the last step's tokens with these indices, at most StepLimits.logits_rows: like the
        model's; valid until the next call."""
        count = len(sample_tokens)
        self._inputs.sample_tokens[:count] = sample_tokens
        self._head.run((count,), self._beats)
        return None if self._head.output is None else self._head.output[:count]

    @property
    def programs(self) -> tuple[Program, Program]:
        """Of the forward pass, whose sizes are tokens and rows, and of logits, by rows."""
        return self._forward, self._head

    @property
    def activation_bytes(self) -> tuple[int, int]:
        """(memory planned for the largest step's activations, what they'd take side by side)."""
        parts = (self._forward, self._head)
        return sum(p.planned_bytes for p in parts), sum(p.buffer_bytes for p in parts)


class _StepBuffers:
    """A step's inputs at addresses that stay; T tokens of R rows are at the front of each."""

    def __init__(self, limits: StepLimits, block_size: int) -> None:
        tokens, blocks = limits.tokens, -(-limits.context // block_size)
        self.input_ids = torch.zeros(tokens, dtype=torch.int64)
        self.positions = torch.zeros(tokens, dtype=torch.int64)
        self.slot_mapping = torch.zeros(tokens, dtype=torch.int64)
        self.cu_query_lens = torch.zeros(tokens + 1, dtype=torch.int32)
        self.context_lens = torch.zeros(tokens, dtype=torch.int32)
        self.block_tables = torch.zeros(tokens, blocks, dtype=torch.int32)
        self.sample_tokens = torch.zeros(limits.logits_rows, dtype=torch.int64)

    def fill(self, inputs: StepInputs) -> StepInputs:
        """Copies a step's inputs to here; returns them as they are here."""
        tokens, attention = len(inputs.input_ids), inputs.attention
        rows, blocks = attention.block_tables.shape
        tables = self.block_tables[:rows]
        tables[:, :blocks] = attention.block_tables
        return replace(
            inputs,
            input_ids=self.input_ids[:tokens].copy_(inputs.input_ids),
            positions=self.positions[:tokens].copy_(inputs.positions),
            attention=replace(
                attention,
                cu_query_lens=self.cu_query_lens[: rows + 1].copy_(attention.cu_query_lens),
                context_lens=self.context_lens[:rows].copy_(attention.context_lens),
                block_tables=tables,
                slot_mapping=self.slot_mapping[:tokens].copy_(attention.slot_mapping),
            ),
        )


def record_model(
    model: CausalLM, group: Group, layout: KVCacheLayout, limits: StepLimits, beats: int
) -> RecordedModel | None:
    """None where the model's steps can't be replayed, which the log says. Collective.

    `beats`: the address of an int64 that every replayed call raises.
    """
    if not group.min(int(ops.can_record())):
        return None
    if limits.tokens < trial_steps.CONTEXT or limits.context < trial_steps.CONTEXT:
        return None  # too small to be tried; the same on all ranks
    recorded, obstacle = None, ""
    with torch.inference_mode():
        try:
            recorded = _record(model, layout, limits, beats)
        except NotRecordable as error:
            obstacle = str(error)
        if _all_could(group, obstacle) and recorded is not None:
            obstacle = _difference(recorded, model, layout, limits)
        if not _all_could(group, obstacle):
            logger.info("steps are not replayed: %s", obstacle or "another shard can't")
            return None
    assert recorded is not None
    planned, apart = recorded.activation_bytes
    fields = {"activation_bytes": planned, "without_sharing": apart}
    logger.info("steps are replayed", extra={"fields": fields})
    return recorded


def _all_could(group: Group, obstacle: str) -> bool:
    return bool(group.min(int(not obstacle)))


def _record(
    model: CausalLM, layout: KVCacheLayout, limits: StepLimits, beats: int
) -> RecordedModel:
    cache = TrialSteps(layout, model.config.vocab_size).new_cache()
    buffers = _StepBuffers(limits, layout.block_size)
    recordings, results = [], []
    for counts in _RECORDED_STEPS:
        step = buffers.fill(TrialSteps(layout, model.config.vocab_size).step(counts))
        sizes = (sum(counts.values()), len(counts))
        with Recording(sizes, _tensors(cache)) as recording:
            result = model.forward(step.input_ids, step.positions, cache, step.attention)
        recordings.append(recording)
        results.append(result)
    forward = Program(recordings, results, (limits.tokens, limits.tokens))
    assert forward.output is not None
    recordings, logits = [], []
    for count in _RECORDED_LOGITS:
        rows = buffers.sample_tokens[:count]
        with Recording((count,)) as recording:
            logits.append(model.logits(ops.take_rows(forward.output, rows)))
        recordings.append(recording)
    head = Program(recordings, logits, (limits.logits_rows,))
    return RecordedModel(model, buffers, forward, head, beats)


def _difference(
    recorded: RecordedModel, model: CausalLM, layout: KVCacheLayout, limits: StepLimits
) -> str:
    """What the model and its replay don't agree on in a few steps; "" if they agree bit by bit."""
    trial = TrialSteps(layout, model.config.vocab_size)
    ours, theirs = trial.new_cache(), trial.new_cache()
    recorded.bind(ours)
    for counts in trial.scenario(limits.tokens):
        step = trial.step(counts)
        expected = model.forward(step.input_ids, step.positions, theirs, step.attention)
        got = recorded.forward(step)
        rows = step.sample_tokens[: limits.logits_rows]
        pairs = [(expected, got)]
        logits = model.logits(ops.take_rows(expected, rows)), recorded.logits(rows)
        if logits[0] is not None and logits[1] is not None:
            pairs.append((logits[0], logits[1]))
        if not all(_same_bits(*pair) for pair in pairs):
            return f"a replay of {len(step.input_ids)} tokens differs from the model's own step"
    return "" if _same_bits(ours.data, theirs.data) else "a replay leaves other keys and values"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


def _tensors(cache: KVCache) -> list[torch.Tensor]:
    return [tensor for pair in cache.layers for tensor in pair]
