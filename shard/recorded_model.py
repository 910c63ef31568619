"""RecordedModel: a model's steps as recorded calls on planned buffers, replayed without Python.

The CPU's counterpart of a CUDA graph, but not tied to a batch size: one recording serves steps of
any number of tokens and rows. Whether a model can be recorded is not asked but tried, before
serving: it is recorded on small steps, and then replays of other steps must give the very bits that
the model gives. Models that compute with torch's own operations don't pass, and run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from headgate.kernels import ops
from headgate.kernels.cpu.program import Program
from headgate.kernels.cpu.recording import NotRecordable, Recording
from headgate.shard import trial_steps
from headgate.shard.distributed import Group
from headgate.shard.kv_cache import KVCache, KVCacheLayout
from headgate.shard.layers.embedding import VocabHead
from headgate.shard.models.base import CausalLM
from headgate.shard.sampling.params import IntArray
from headgate.shard.step_inputs import StepInputs
from headgate.shard.step_rows import StepArrays
from headgate.shard.trial_steps import TrialSteps

logger = logging.getLogger(__name__)

# Tokens of each row, how many of these are wanted, how many of those get logits, and whether these
# are asked for no more than the likeliest tokens, in the recordings: of the first, with a token
# more, and so on.
_RECORDED_STEPS = (
    ({0: 3, 1: 1}, 3, 2, 0),
    ({0: 4, 1: 1}, 3, 2, 0),
    ({0: 2, 1: 1, 2: 1}, 3, 2, 0),
    ({0: 3, 1: 1}, 4, 2, 0),
    ({0: 3, 1: 1}, 3, 3, 0),
    ({0: 3, 1: 1}, 3, 2, 1),
)
_RECORDED_LOGITS = ((2, 0), (3, 0), (2, 1))


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step."""

    tokens: int
    context: int  # positions of the longest row
    logits_rows: int  # rows that get logits at once


class RecordedModel:
    """Computes what the model's `forward` and `logits` do. Made by `record_model`."""

    def __init__(
        self,
        model: CausalLM,
        inputs: _StepBuffers,
        step: Program,
        head: Program,
        beats: int,
        *,
        chooses: bool,
    ) -> None:
        """chooses: whether the programs give the tokens of `VocabHead.choose` before logits."""
        self._model = model
        self._inputs = inputs
        self._step = step
        self._head = head
        self._beats = beats
        self.most_logits = inputs.most_logits  # that come with a step
        self._num_samples = 0  # of the last step
        self._plain = 0  # whether it was
        self._chooses = chooses
        if chooses:
            # NumPy's views: between two steps PyTorch's code is out of the caches, and slow.
            self._step_tokens, self._head_tokens = step.outputs[1].numpy(), head.outputs[0].numpy()
            self._tokens_at = step.outputs[1].data_ptr()

    def bind(self, kv_cache: KVCache) -> None:
        """From now on steps use this cache, of the layout it was recorded with."""
        self._step.bind([tensor.data_ptr() for tensor in _layer_tensors(kv_cache)])

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Normed hidden states of the wanted tokens [W, hidden_size], valid until the next step."""
        self._model.check_lengths(inputs.attention)
        self._inputs.fill(inputs)
        self._num_samples, self._plain = inputs.num_samples, int(inputs.plain)
        tokens, rows = len(inputs.input_ids), len(inputs.attention.context_lens)
        wanted, sampled = len(inputs.wanted_tokens), min(self._num_samples, self.most_logits)
        self._step.run((tokens, rows, wanted, sampled, self._plain), self._beats)
        return self._step.outputs[0][:wanted]

    @property
    def arrays(self) -> StepArrays:
        """Where `replay` finds its inputs."""
        return self._inputs.arrays

    def replay(self, tokens: int, rows: int, num_samples: int, *, plain: bool) -> None:
        """A step whose inputs are in `arrays` already; all its wanted tokens are sampled after.
        num_samples, plain: as in StepInputs."""
        self._num_samples, self._plain = num_samples, int(plain)
        sampled = min(num_samples, self.most_logits)
        self._step.run((tokens, rows, num_samples, sampled, self._plain), self._beats)

    def logits(self, first: int) -> torch.Tensor | None:
        """Of the last step's tokens before draws from place `first` on, StepLimits.logits_rows of
        them or all that are left; valid until the next call. Not where it has the `likeliest`."""
        outputs, count = self._found(first)
        logits = outputs[1:] if self._chooses else outputs
        return logits[0][:count] if logits else None  # rank 0 alone has them

    @property
    def likeliest_at(self) -> int | None:
        """The address of `likeliest`, valid until the next step; None where there is none, or not
        all in one piece."""
        if not self._plain or not self._chooses or self._num_samples > self.most_logits:
            return None
        return self._tokens_at

    def likeliest(self) -> IntArray | None:
        """int64[S] on all ranks: the likeliest tokens of the last step's places, if it was plain;
        None where it was not, or the model makes its logits in a way of its own."""
        if not self._plain or not self._chooses:
            return None
        parts = [self._step_tokens[: min(self._num_samples, self.most_logits)].copy()]
        for first in range(self.most_logits, self._num_samples, self.most_logits):
            _, count = self._found(first)
            parts.append(self._head_tokens[:count].copy())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _found(self, first: int) -> tuple[Sequence[torch.Tensor], int]:
        """(what the head came to for the places from `first` on, of how many it is)."""
        count = min(self._num_samples - first, self.most_logits)
        if not first:  # it came with the step
            return self._step.outputs[1:], count
        self._inputs.places[:count] = torch.arange(first, first + count)
        self._head.run((count, self._plain), self._beats)
        return self._head.outputs, count

    @property
    def programs(self) -> tuple[Program, Program]:
        """Of a step, whose sizes are tokens, rows, tokens wanted, those of them that get logits,
        and 1 where no more is asked for than the likeliest; of more logits, with the last two."""
        return self._step, self._head

    @property
    def activation_bytes(self) -> tuple[int, int]:
        """(memory planned for the largest step's activations, what they'd take side by side)."""
        parts = (self._step, self._head)
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
        self.most_logits = limits.logits_rows
        self.wanted_tokens = torch.zeros(tokens, dtype=torch.int64)
        recorded = max(_RECORDED_LOGITS)[0]  # maybe more than will ever be replayed
        self.places = torch.zeros(max(self.most_logits, recorded), dtype=torch.int64)
        # NumPy's copies of a few numbers cost less than torch's.
        self.arrays = StepArrays(
            input_ids=self.input_ids.numpy(),
            positions=self.positions.numpy(),
            slot_mapping=self.slot_mapping.numpy(),
            cu_query_lens=self.cu_query_lens.numpy(),
            context_lens=self.context_lens.numpy(),
            block_tables=self.block_tables.numpy(),
            wanted_tokens=self.wanted_tokens.numpy(),
        )

    def fill(self, inputs: StepInputs) -> None:
        """Copies a step's inputs to here."""
        attention, arrays = inputs.attention, self.arrays
        rows, blocks = attention.block_tables.shape
        arrays.block_tables[:rows, :blocks] = attention.block_tables.numpy()
        for array, source in (
            (arrays.input_ids, inputs.input_ids),
            (arrays.positions, inputs.positions),
            (arrays.slot_mapping, attention.slot_mapping),
            (arrays.cu_query_lens, attention.cu_query_lens),
            (arrays.context_lens, attention.context_lens),
            (arrays.wanted_tokens, inputs.wanted_tokens),
        ):
            array[: len(source)] = source.numpy()

    def placed(self, inputs: StepInputs) -> StepInputs:
        """The step's inputs as they are here once they are filled in."""
        tokens, attention = len(inputs.input_ids), inputs.attention
        rows = len(attention.context_lens)
        return replace(
            inputs,
            input_ids=self.input_ids[:tokens],
            positions=self.positions[:tokens],
            attention=replace(
                attention,
                cu_query_lens=self.cu_query_lens[: rows + 1],
                context_lens=self.context_lens[:rows],
                block_tables=self.block_tables[:rows],
                slot_mapping=self.slot_mapping[:tokens],
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
    attempt = _Attempt(model, group, layout, limits)
    with torch.inference_mode():
        try:
            recorded = attempt.record(beats)
            attempt.compare(recorded)
        except NotRecordable as error:
            logger.info("steps are not replayed: %s", error)
            return None
    planned, apart = recorded.activation_bytes
    fields = {"activation_bytes": planned, "without_sharing": apart}
    logger.info("steps are replayed", extra={"fields": fields})
    return recorded


class _Attempt:
    """The making of a RecordedModel. What the model computes is collective, so a rank that has met
    an obstacle goes on with the others to the next vote, where all of them give up."""

    def __init__(
        self, model: CausalLM, group: Group, layout: KVCacheLayout, limits: StepLimits
    ) -> None:
        self._model = model
        self._group = group
        self._layout = layout
        self._limits = limits
        # A model that makes its logits in a way of its own has these alone.
        chooses = type(model).logits is CausalLM.logits and isinstance(model.head, VocabHead)
        self._chooses = bool(group.min(int(chooses)))

    def record(self, beats: int) -> RecordedModel:
        """Raises NotRecordable, on all ranks."""
        cache = self._trial().new_cache()
        buffers = _StepBuffers(self._limits, self._layout.block_size)
        recordings, results = [], []
        for counts, wanted, sampled, plain in _RECORDED_STEPS:
            step = self._trial().step(counts)
            buffers.fill(step)
            step = buffers.placed(step)
            sizes = (sum(counts.values()), len(counts), wanted, sampled, plain)
            with Recording(sizes, _layer_tensors(cache)) as recording:
                hidden = self._model.forward(
                    step.input_ids,
                    step.positions,
                    cache,
                    step.attention,
                    buffers.wanted_tokens[:wanted],
                )
                found = self._head(hidden[:sampled], plain)
            recordings.append(recording)
            results.append([hidden, *found])
        limits = self._limits
        most = (limits.tokens, limits.tokens, limits.tokens, limits.logits_rows, 1)
        step_program = self._program(recordings, results, most)
        recordings, results = [], []
        for sampled, plain in _RECORDED_LOGITS:
            with Recording((sampled, plain)) as recording:
                rows = ops.take_rows(step_program.outputs[0], buffers.places[:sampled])
                found = self._head(rows, plain)
            recordings.append(recording)
            results.append(found)
        head = self._program(recordings, results, (limits.logits_rows, 1))
        return RecordedModel(self._model, buffers, step_program, head, beats, chooses=self._chooses)

    def _head(self, hidden: torch.Tensor, plain: int) -> list[torch.Tensor]:
        """[the likeliest tokens, ][logits, on rank 0]"""
        found: list[torch.Tensor | None]
        if self._chooses:
            found = [*self._model.head.choose(hidden, plain)]
        else:
            found = [self._model.logits(hidden)]
        return [part for part in found if part is not None]

    def compare(self, recorded: RecordedModel) -> None:
        """Raises NotRecordable, on all ranks, if the model and its replay don't agree bit by bit in
        a few steps."""
        trial, model, obstacle = self._trial(), self._model, ""
        ours, theirs = trial.new_cache(), trial.new_cache()
        recorded.bind(ours)
        for counts in trial.scenario(self._limits.tokens):
            step = trial.step(counts)
            states = model.forward(step.input_ids, step.positions, theirs, step.attention)
            expected = ops.take_rows(states, step.wanted_tokens)
            same = _same_bits(expected, recorded.forward(replace(step, plain=False)))
            likeliest, equal = self._compare_logits(expected, recorded, step.num_samples)
            same &= equal
            if len(step.input_ids) <= trial_steps.CONTEXT:  # not the largest, which takes longest
                recorded.forward(replace(step, plain=True))
                tokens = recorded.likeliest()
                same &= tokens is None or np.array_equal(tokens, likeliest)
            if not same and not obstacle:
                obstacle = (
                    f"a replay of {len(step.input_ids)} tokens differs from the model's own step"
                )
        if not obstacle and not all(map(_same_bits, ours.tensors, theirs.tensors)):
            obstacle = "a replay leaves other keys and values"
        self._vote(obstacle)

    def _compare_logits(
        self, hidden: torch.Tensor, recorded: RecordedModel, count: int
    ) -> tuple[IntArray, bool]:
        """(the likeliest tokens by the model's logits of the first states, on all ranks; whether
        those of the last step are the same)."""
        likeliest, same = torch.zeros(count, dtype=torch.int64), True
        for first in range(0, count, self._limits.logits_rows):
            stop = min(first + self._limits.logits_rows, count)
            ours, theirs = self._model.logits(hidden[first:stop]), recorded.logits(first)
            if ours is not None and theirs is not None:
                same &= _same_bits(ours, theirs)
                likeliest[first:stop] = torch.from_numpy(ops.argmax(ours))
        return self._group.broadcast(likeliest).numpy(), same

    def _program(
        self,
        recordings: Sequence[Recording],
        results: Sequence[Sequence[torch.Tensor]],
        largest: Sequence[int],
    ) -> Program:
        program, obstacle = None, ""
        try:
            program = Program(recordings, results, largest)
        except NotRecordable as error:
            obstacle = str(error)
        self._vote(obstacle)
        assert program is not None  # or the vote has failed
        return program

    def _vote(self, obstacle: str) -> None:
        if not self._group.min(int(not obstacle)):
            raise NotRecordable(obstacle or "another shard can't")

    def _trial(self) -> TrialSteps:
        return TrialSteps(self._layout, self._model.config.vocab_size)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _layer_tensors(cache: KVCache) -> list[torch.Tensor]:
    """What the calls get: keys and values of each layer, and their scales where there are any."""
    return [part for tensor in cache.tensors for layer in tensor for part in layer]
