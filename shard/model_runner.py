"""ModelRunner: a StepPlan in, a StepResult out. Owns the model's KV cache and the InputBatch.

It decides nothing about which row runs when, and speaks no protocol. Called from one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace

import numpy as np
import torch

from headgate.kernels import ops
from headgate.proto.messages import (
    PooledStates,
    Pooling,
    PromptLogprobs,
    RowEnd,
    StepPlan,
    StepResult,
    TopTokens,
)
from headgate.shard.config import ShardConfig, ShardIdentity
from headgate.shard.cuda_graphs import MAX_HEAD_DIM, CudaDevice, GraphedModel, usual_sizes
from headgate.shard.distributed import Group
from headgate.shard.errors import ModelError
from headgate.shard.input_batch import BatchLimits, InputBatch, PlanError, ScheduledRows
from headgate.shard.kv_cache import KVCache, KVCacheLayout
from headgate.shard.memory import is_out_of_memory
from headgate.shard.models.base import CausalLM
from headgate.shard.recorded_model import RecordedModel, StepLimits, record_model
from headgate.shard.runner import Heartbeat, RunnerFacts
from headgate.shard.sampling.grammar import NO_MASKS, GrammarMasks, Masks
from headgate.shard.sampling.logprobs import NO_TOP, token_logprobs
from headgate.shard.sampling.params import NO_TOKEN, IntArray
from headgate.shard.sampling.sampler import argmax, sample
from headgate.shard.step_inputs import PooledChunk, PromptChunk, StepInputs, build_inputs
from headgate.shard.vote import plan_tag, vote
from headgate.shard.warmup import warm_up

logger = logging.getLogger(__name__)

# Rows whose logits are in memory at once: 64 rows of 152k tokens are 39 MB.
_LOGITS_ROWS = 64


class ModelRunner:
    """One rank's share of the model's steps."""

    def __init__(
        self, model: CausalLM, group: Group, config: ShardConfig, identity: ShardIdentity
    ) -> None:
        self.model = model
        self.group = group
        self.config = config
        self.identity = identity
        self.heartbeat = Heartbeat()
        model.heartbeat = self.heartbeat.beat
        self.kv_layout = KVCacheLayout(
            num_layers=model.num_layers,
            block_size=config.block_size,
            num_kv_heads=model.num_local_kv_heads,
            head_dim=model.head_dim,
            dtype=config.kv_dtype,
        )
        self._grammars = GrammarMasks(
            config.model_path,
            model.config.vocab_size,
            model.config.eos_token_ids,
            config.num_threads,
        )
        self.recorded: RecordedModel | GraphedModel | None = None
        self._kv_cache: KVCache | None = None
        self._batch: InputBatch | None = None
        self._refusing = ""  # why every plan is refused until one resets
        self._sequence = 0  # of the last plan; 0: any may follow

    @property
    def facts(self) -> RunnerFacts:
        config = self.model.config
        return RunnerFacts(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=config.eos_token_ids,
            weight_bytes=self.model.weight_bytes,
            kv_bytes_per_block=self.kv_layout.bytes_per_block,
        )

    def warm_up(self, max_tokens: int, max_rows: int) -> int:
        """See warmup.py."""
        return warm_up(self, max_tokens, max_rows)

    def record(self) -> None:
        """Has steps replayed from now on, where the model allows that. Collective."""
        config = self.config
        if config.device == "cuda":
            self.recorded = self._graphed_model()
            return
        limits = StepLimits(config.max_batch_prefill_tokens, config.max_total_tokens, _LOGITS_ROWS)
        self.recorded = record_model(
            self.model, self.group, self.kv_layout, limits, self.heartbeat.address
        )

    def _graphed_model(self) -> GraphedModel | None:
        """None where decode steps are not captured: by --cuda-graphs, or since the reference's
        attention would wait for the device."""
        config = self.config
        sizes = config.graph_sizes
        if sizes is None:
            sizes = tuple(usual_sizes(config.max_batch_size))
        if not sizes or ops.active() != "triton" or self.model.head_dim > MAX_HEAD_DIM:
            return None
        row_blocks = -(-config.max_total_tokens // config.block_size)
        return GraphedModel(self.model, CudaDevice(), sizes, row_blocks)

    def allocate(self, num_blocks: int) -> None:
        """Makes the KV cache; drops the one before it, and all rows.

        Raises ModelError where there is not enough memory.
        """
        self.release()
        try:
            self._kv_cache = KVCache(self.kv_layout, num_blocks, self.config.device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            size = num_blocks * self.kv_layout.bytes_per_block
            raise ModelError(
                f"the KV cache of {num_blocks} blocks takes {size} bytes, "
                "and there is not enough memory for it"
            ) from error
        if self.recorded is not None:
            self.recorded.bind(self._kv_cache)
        self._batch = self._new_batch(num_blocks)
        self.reset()
        logger.info(
            "KV cache allocated",
            extra={"fields": {"blocks": num_blocks, "bytes": self._kv_cache.num_bytes}},
        )

    def _new_batch(self, num_blocks: int) -> InputBatch:
        config = self.config
        limits = BatchLimits(
            num_blocks=num_blocks,
            block_size=config.block_size,
            vocab_size=self.model.config.vocab_size,
            max_total_tokens=config.max_total_tokens,
            max_step_tokens=config.max_batch_prefill_tokens,
            expected_rows=config.max_batch_size,
        )
        return InputBatch(limits, self.model.config.eos_token_ids)

    def prepare_grammar(self, source: str) -> None:
        """Compiles it, beside the model's thread. One that does not compile fails with its row."""
        wait((self._grammars.prepare(source),))

    def reset(self) -> None:
        """Drops all rows: a new stream of plans begins."""
        if self._batch is not None:
            self._batch.clear()
        self._refusing, self._sequence = "", 0

    def release(self) -> None:
        """Gives the KV cache back."""
        self._kv_cache = self._batch = None
        if isinstance(self.recorded, GraphedModel):
            self.recorded.release()

    def step(
        self,
        plan: StepPlan,
        is_current: Callable[[], bool] = lambda: True,
        problem: str = "",
    ) -> StepResult:
        """Runs the plan on all ranks, or refuses it on all of them (StepResult.refused).

        Rank 0's result has the tokens. After a refusal all are refused until one with `reset`.
        `is_current` tells whether the plan's sender still waits; Superseded is raised if the ranks
        disagree on the plan and it does not. Any other exception is fatal to the group.
        `problem`: a reason of the caller's to refuse the plan.
        """
        self.heartbeat.busy = True
        try:
            with torch.inference_mode():
                return self._step(plan, is_current, problem)
        finally:
            self.heartbeat.busy = False

    def _step(self, plan: StepPlan, is_current: Callable[[], bool], problem: str) -> StepResult:
        started = time.perf_counter_ns()
        answer = StepResult(plan.epoch, plan.sequence)
        scheduled: ScheduledRows | None = None
        inputs: StepInputs | None = None
        if not problem:
            scheduled, inputs, problem = self._prepare(plan)
        if self.group.world_size > 1:
            refusing = vote(self.group, plan_tag(plan), not problem, is_current)
            if refusing and not problem:
                problem = f"refused by shard {', '.join(map(str, refusing))}"
        if problem:
            self._refusing = problem
            fields = {"sequence": plan.sequence, "reason": problem}
            logger.warning("plan refused", extra={"fields": fields})
            return replace(answer, refused=problem, total_ns=time.perf_counter_ns() - started)
        assert scheduled is not None  # only None beside a problem
        forward = time.perf_counter_ns()
        answer = self._execute(plan, scheduled, inputs, answer)
        done = time.perf_counter_ns()
        return replace(answer, forward_ns=done - forward, total_ns=done - started)

    def _prepare(self, plan: StepPlan) -> tuple[ScheduledRows | None, StepInputs | None, str]:
        """(rows, inputs, ""), or (None, None, why the plan is refused); no inputs without rows."""
        try:
            self._check_order(plan)
            assert self._batch is not None  # _check_order
            scheduled = self._batch.apply(plan)
            if not len(scheduled.slots):
                return scheduled, None, ""
            # A recorded model takes its inputs from the host's memory.
            device = self.config.device if self.recorded is None else "cpu"
            return scheduled, build_inputs(self._batch, scheduled, device), ""
        except (PlanError, MemoryError, RuntimeError) as error:
            if not isinstance(error, PlanError) and not is_out_of_memory(error):
                raise
            reason = str(error) if isinstance(error, PlanError) else "out of memory"
            return None, None, f"shard {self.identity.rank}: {reason}"

    def _check_order(self, plan: StepPlan) -> None:
        if self._batch is None:
            raise PlanError("a plan came before Allocate")
        if plan.epoch != self.identity.epoch:
            raise PlanError(f"plan of epoch {plan.epoch} in epoch {self.identity.epoch}")
        last, self._sequence = self._sequence, plan.sequence
        if plan.reset:
            self._refusing = ""
        elif self._refusing:
            raise PlanError(f"resync needed since: {self._refusing}")
        elif last and plan.sequence != last + 1:
            raise PlanError(f"plan {plan.sequence} after plan {last}")

    def _execute(
        self,
        plan: StepPlan,
        scheduled: ScheduledRows,
        inputs: StepInputs | None,
        answer: StepResult,
    ) -> StepResult:
        assert self._batch is not None and self._kv_cache is not None
        self._kv_cache.copy_blocks(plan.copies)
        if inputs is None:
            return answer
        slots = scheduled.slots[scheduled.samples]
        finish_masks = self._begin_masks(plan, slots)
        if self.recorded is not None:
            hidden = self.recorded.forward(inputs)
        else:
            hidden = self.model.forward(
                inputs.input_ids, inputs.positions, self._kv_cache, inputs.attention
            )
        prompt_logprobs = tuple(
            entry
            for chunk in inputs.prompt_chunks
            if (entry := self._prompt_logprobs(hidden, chunk)) is not None
        )
        row_ids = self._batch.ids[slots].tolist()
        masks = finish_masks()
        tokens, logprobs, top = self._sample(hidden, inputs.sample_tokens, slots, masks)
        ends = self._batch.advance(scheduled, tokens)
        if self.group.rank:
            return answer
        return replace(
            answer,
            rows=row_ids,
            token_ids=np.maximum(tokens, 0).tolist(),
            logprobs=logprobs,
            ends=[RowEnd(end) for end in ends.tolist()],
            top=top,
            prompt_logprobs=prompt_logprobs,
            pooled=[_pooled(hidden, chunk) for chunk in inputs.pooled_chunks],
            failures={
                row: masks.failures[slot]
                for row, slot in zip(row_ids, slots.tolist(), strict=True)
                if slot in masks.failures
            },
        )

    def _begin_masks(self, plan: StepPlan, slots: IntArray) -> Callable[[], Masks]:
        """Has the masks of the rows that sample computed while the forward pass runs."""
        if self.group.rank:
            return lambda: NO_MASKS
        assert self._batch is not None
        for row in plan.new_rows:
            if row.sampling.grammar:
                self._grammars.prepare(row.sampling.grammar)
        return self._grammars.begin(self._batch.constrained_rows(slots))

    def _sample(
        self, hidden: torch.Tensor, sample_tokens: torch.Tensor, slots: IntArray, masks: Masks
    ) -> tuple[IntArray, list[float], list[TopTokens]]:
        """Each row's token on all ranks; logprobs and alternatives on rank 0. slots: int64[S].

        A row that its grammar cannot go on with gets NO_TOKEN, a pooled one 0.
        """
        assert self._batch is not None
        tokens = np.zeros(len(slots), np.int64)
        logprobs = [0.0] * len(slots)
        top: list[TopTokens] = []
        plain = self._batch.plain[slots].all()
        drawn = np.arange(len(slots))
        if not plain:
            drawn = np.flatnonzero(self._batch.params["pooling"][slots] == Pooling.NONE)
        for start in range(0, len(drawn), _LOGITS_ROWS):
            part = drawn[start : start + _LOGITS_ROWS]
            if isinstance(self.recorded, RecordedModel):
                logits = self.recorded.logits(start)
            elif self.recorded is not None:
                logits = self.recorded.logits(sample_tokens[start : start + _LOGITS_ROWS])
            else:
                rows = sample_tokens[start : start + _LOGITS_ROWS]
                logits = self.model.logits(ops.take_rows(hidden, rows))
            self.heartbeat.beat()
            if logits is None:
                continue
            if plain:
                tokens[part] = argmax(logits)
                continue
            tokens[part] = sample(logits, self._batch.sampled_rows(slots[part], masks))
            self._add_logprobs(logits, tokens[part], slots[part], (part, logprobs, top))
        if masks.failures:
            tokens[np.isin(slots, list(masks.failures))] = NO_TOKEN
        if top:
            top.extend([NO_TOP] * (len(slots) - len(top)))
        if self.group.world_size > 1 and len(slots):
            shared = torch.from_numpy(tokens).to(self.config.device)
            tokens = self.group.broadcast(shared).cpu().numpy()
        return tokens, logprobs, top

    def _add_logprobs(
        self,
        logits: torch.Tensor,
        tokens: IntArray,
        slots: IntArray,
        found: tuple[IntArray, list[float], list[TopTokens]],
    ) -> None:
        """Fills in what the rows asked for. found: (the rows' places, logprobs, top tokens)."""
        assert self._batch is not None
        places, logprobs, top = found
        params = self._batch.params[slots]
        asking = np.flatnonzero(params["logprobs"] | (params["top_n_tokens"] > 0))
        if not len(asking):
            return
        rows = logits
        if len(asking) < len(logits):
            rows = logits[torch.from_numpy(asking).to(logits.device)]
        top_n = params["top_n_tokens"][asking].tolist()
        values, alternatives = token_logprobs(rows, tokens[asking], top_n)
        asking = places[asking]
        for place, value in zip(asking.tolist(), values, strict=True):
            logprobs[place] = value
        for place, tops in zip(asking.tolist(), alternatives, strict=False):  # or no alternatives
            top.extend([NO_TOP] * (place - len(top)))
            top.append(tops)

    def _prompt_logprobs(self, hidden: torch.Tensor, chunk: PromptChunk) -> PromptLogprobs | None:
        """The chunk's entry on rank 0; all ranks take part. hidden: [T, H] of the whole step."""
        values: list[float] = []
        top: list[TopTokens] = []
        for start in range(0, len(chunk.targets), _LOGITS_ROWS):
            targets = chunk.targets[start : start + _LOGITS_ROWS]
            first = chunk.first + start
            logits = self.model.logits(hidden[first : first + len(targets)])
            self.heartbeat.beat()
            if logits is not None:
                found, alternatives = token_logprobs(logits, targets, [chunk.top_n] * len(targets))
                values += found
                top += alternatives
        if self.group.rank:
            return None
        return PromptLogprobs(chunk.row_id, chunk.start, values, top)


def _pooled(hidden: torch.Tensor, chunk: PooledChunk) -> PooledStates:
    """hidden: [T, H] of the whole step, the same on all ranks.

    In double precision, so that the sum does not show how the prompt was cut into chunks.
    """
    states = hidden[chunk.first : chunk.first + chunk.stop - chunk.start]
    sums = states.double().sum(0).tolist()
    return PooledStates(chunk.row_id, chunk.start, chunk.stop, sums)
