"""ModelRunner: a StepPlan in, a StepResult out. Owns the model's KV cache and the InputBatch.

It decides nothing about which row runs when, and speaks no protocol. Called from one thread.

On a GPU a step is begun while the one before may still be under way: what that one samples stays on
the device, where the new one's inputs take it from, and is copied to the host beside the new one's
work. `InputBatch.must_settle` says which plans wait for the tokens all the same.
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
    ROW_ENDS,
    StepPlan,
    StepResult,
    TopTokens,
)
from headgate.shard import samplers
from headgate.shard.batch_limits import BatchLimits
from headgate.shard.config import ShardConfig, ShardIdentity
from headgate.shard.cuda_graphs import MAX_HEAD_DIM, GraphedModel, GraphLimits, usual_sizes
from headgate.shard.device import CudaDevice, Device
from headgate.shard.distributed import Group
from headgate.shard.errors import ModelError
from headgate.shard.input_batch import InputBatch, PlanError
from headgate.shard.kv_cache import KVCache, KVCacheLayout
from headgate.shard.memory import is_out_of_memory
from headgate.shard.models.base import CausalLM
from headgate.shard.pending_step import PendingStep, StepQueue
from headgate.shard.prompt_results import pooled, prompt_logprobs
from headgate.shard.recorded_model import RecordedModel, StepLimits, record_model
from headgate.shard.runner import Heartbeat, RunnerFacts
from headgate.shard.samplers import DeviceSampler, HostSampler, Logits, Sampled
from headgate.shard.sampling.grammar import NO_MASKS, GrammarMasks, Masks
from headgate.shard.sampling.params import IntArray
from headgate.shard.scheduled_rows import Draws, ScheduledRows
from headgate.shard.step_clock import StepClock
from headgate.shard.step_inputs import StepInputs, build_inputs
from headgate.shard.step_rows import StepRows
from headgate.shard.vote import Vote, plan_tag
from headgate.shard.warmup import warm_up

logger = logging.getLogger(__name__)

# For the KV cache's memory (KVCache.take_memory): of a start; then, at a time, while nothing runs.
TAKE_MEMORY_SECONDS = 0.25
REST_SECONDS = 0.005


class ModelRunner:
    """One rank's share of the model's steps."""

    def __init__(
        self,
        model: CausalLM,
        group: Group,
        config: ShardConfig,
        identity: ShardIdentity,
        device: Device | None = None,
    ) -> None:
        """device: where the model is, if that is not the host; by default as `config` says."""
        if device is None and config.device == "cuda":
            device = CudaDevice()
        self.device = device
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
        self._host_sampler = HostSampler(group, config.device)
        self._device_sampler: DeviceSampler | None = None
        self._vote = Vote(group)
        self._under_way = StepQueue()
        self._last_done = 0  # when the last step was settled
        self._kv_cache: KVCache | None = None
        self._batch: InputBatch | None = None
        self._step_rows: StepRows | None = None  # where steps are replayed
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

    @property
    def _logits_rows(self) -> int:
        return samplers.LOGITS_ROWS if self.device is None else samplers.GPU_LOGITS_ROWS

    def warm_up(self, max_tokens: int, max_rows: int) -> int:
        """See warmup.py."""
        return warm_up(self, max_tokens, max_rows)

    def record(self) -> None:
        """Has steps replayed from now on, where the model allows that. Collective."""
        config = self.config
        if self.device is None:
            limits = StepLimits(
                config.max_batch_prefill_tokens, config.max_total_tokens, self._logits_rows
            )
            self.recorded = record_model(
                self.model, self.group, self.kv_layout, limits, self.heartbeat.address
            )
        elif ops.active() == "triton" and self.model.head_dim <= MAX_HEAD_DIM:
            # The reference's attention would wait for the device.
            self._graph(self.device)

    def _graph(self, device: Device) -> None:
        config = self.config
        sizes = config.graph_sizes
        if sizes is None:
            sizes = tuple(usual_sizes(config.max_batch_size))
        row_blocks = -(-config.max_total_tokens // config.block_size)
        limits = GraphLimits(config.max_batch_prefill_tokens, row_blocks)
        graphed = self.recorded = GraphedModel(self.model, device, sizes, limits)
        self._device_sampler = DeviceSampler(self.group, graphed.staging, graphed.last_tokens)

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
        if self.device is None:
            self._kv_cache.take_memory(TAKE_MEMORY_SECONDS, self.config.num_threads)
        if self.recorded is not None:
            self.recorded.bind(self._kv_cache)
        self._batch = self._new_batch(num_blocks)
        if isinstance(self.recorded, RecordedModel):
            self._step_rows = StepRows(self._batch, self.recorded.arrays)
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

    def rest(self) -> bool:
        """Takes some more of a CPU's memory for the KV cache; False where there is none to take."""
        cache = self._kv_cache
        if self.device is not None or cache is None:
            return False
        return cache.take_memory(REST_SECONDS, self.config.num_threads)

    def reset(self) -> None:
        """Drops all rows: a new stream of plans begins. Results not settled are lost."""
        self._drop_steps()
        if self._batch is not None:
            self._batch.clear()
        self._refusing, self._sequence = "", 0

    def release(self) -> None:
        """Gives the KV cache back."""
        self._drop_steps()
        self._kv_cache = self._batch = self._step_rows = None
        if isinstance(self.recorded, GraphedModel):
            self.recorded.release()

    def _drop_steps(self) -> None:
        self._under_way.drop(StepResult(self.identity.epoch, self._sequence))
        self.heartbeat.busy = False

    def step(
        self,
        plan: StepPlan,
        is_current: Callable[[], bool] = lambda: True,
        problem: str = "",
    ) -> StepResult:
        """`begin`, and the result."""
        return self.begin(plan, is_current, problem).result()

    def begin(
        self,
        plan: StepPlan,
        is_current: Callable[[], bool] = lambda: True,
        problem: str = "",
    ) -> PendingStep:
        """Runs the plan on all ranks, or refuses it on all of them (StepResult.refused).

        Rank 0's result has the tokens. After a refusal all are refused until one with `reset`.
        `is_current` tells whether the plan's sender still waits; Superseded is raised if the ranks
        disagree on the plan and it does not. Any other exception is fatal to the group.
        `problem`: a reason of the caller's to refuse the plan.

        On a device the step may be under way yet, and the next may be begun.
        """
        self.heartbeat.busy = True
        try:
            if torch.is_inference_mode_enabled():  # by the model's thread
                return self._begin(plan, is_current, problem)
            with torch.inference_mode():
                return self._begin(plan, is_current, problem)
        finally:
            self.heartbeat.busy = len(self._under_way) > 0

    def _begin(self, plan: StepPlan, is_current: Callable[[], bool], problem: str) -> PendingStep:
        started = time.perf_counter_ns()
        self._settle(plan)
        self.heartbeat.busy = True  # a step settled may have said otherwise
        answer = StepResult(plan.epoch, plan.sequence)
        prepared: _Prepared | StepRows | None = None
        if not problem:
            try:
                prepared = self._prepare(plan)
            except (PlanError, MemoryError, RuntimeError) as error:
                if not isinstance(error, PlanError) and not is_out_of_memory(error):
                    raise
                reason = str(error) if isinstance(error, PlanError) else "out of memory"
                problem = f"shard {self.identity.rank}: {reason}"
        if self.group.world_size > 1:
            refusing = self._vote(plan_tag(plan), not problem, is_current)
            if refusing and not problem:
                problem = f"refused by shard {', '.join(map(str, refusing))}"
        if problem:
            self._refusing = problem
            fields = {"sequence": plan.sequence, "reason": problem}
            logger.warning("plan refused", extra={"fields": fields})
            refused = replace(answer, refused=problem, total_ns=time.perf_counter_ns() - started)
            return PendingStep.done(refused)
        assert prepared is not None  # only None beside a problem
        if isinstance(prepared, StepRows):
            return PendingStep.done(self._replay(plan, prepared, started))
        return self._execute(plan, *prepared, StepClock(answer, started))

    def _settle(self, plan: StepPlan) -> None:
        """The step before may stay under way, if the plan can do without its tokens."""
        if not len(self._under_way):
            return
        must = self._batch is None or self._batch.must_settle(plan)
        self._under_way.settle(leave=0 if must else 1)

    def _prepare(self, plan: StepPlan) -> _Prepared | StepRows:
        """The step's rows and inputs; those of most plans are laid out where a replay finds them.

        Raises PlanError, and MemoryError or RuntimeError for a lack of memory.
        """
        self._check_order(plan)
        batch, step_rows = self._batch, self._step_rows
        assert batch is not None  # _check_order
        batch.change(plan)
        self._prepare_grammars(plan)
        if step_rows is not None and step_rows.place(plan):
            return step_rows
        scheduled = batch.schedule(plan)
        if not len(scheduled.slots):
            return scheduled, None
        # A recorded model takes its inputs from the host's memory.
        device = self.config.device if self.recorded is None else "cpu"
        return scheduled, build_inputs(batch, scheduled, device)

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
        self, plan: StepPlan, scheduled: ScheduledRows, inputs: StepInputs | None, clock: StepClock
    ) -> PendingStep:
        assert self._batch is not None and self._kv_cache is not None
        if isinstance(self.recorded, GraphedModel):
            self.recorded.staging.begin()
        self._copy_blocks(plan)
        if inputs is None:
            return PendingStep.done(clock.stopped(self._last_done))
        draws = self._batch.draws(scheduled)
        finish_masks = self._begin_masks(draws.slots)
        if self.recorded is not None:
            hidden = self.recorded.forward(inputs)
        else:
            hidden = self.model.forward(
                inputs.input_ids,
                inputs.positions,
                self._kv_cache,
                inputs.attention,
                inputs.wanted_tokens,
            )
        logprobs = [
            prompt_logprobs(hidden, chunk, self._prompt_logits, self._logits_rows)
            for chunk in inputs.prompt_chunks
        ]
        if not self.group.rank and (logprobs or inputs.pooled_chunks):
            states = [pooled(hidden, chunk) for chunk in inputs.pooled_chunks]
            clock.answer = replace(clock.answer, prompt_logprobs=tuple(logprobs), pooled=states)
        masks = finish_masks()

        def logits_of(first: int) -> torch.Tensor | None:
            self.heartbeat.beat()
            return self._logits(hidden[: inputs.num_samples], first)

        likeliest = None
        if isinstance(self.recorded, RecordedModel):
            likeliest = self.recorded.likeliest()
        logits = Logits(logits_of, self._logits_rows, likeliest)
        sampler = self._device_sampler
        if sampler is None or masks.failures or self._batch.is_watermarked(draws.slots):
            tokens = self._host_sampler.sample(self._batch, draws, masks, logits)
            finish = self._finisher(scheduled, draws, lambda: tokens, masks, clock)
            return PendingStep.done(finish())
        wait, sampled = sampler.sample(self._batch, draws, masks, logits)
        finish = self._finisher(scheduled, draws, sampled, masks, clock)
        step = PendingStep(finish, wait, self._under_way)
        self._under_way.add(step)
        return step

    def _replay(self, plan: StepPlan, rows: StepRows, started: int) -> StepResult:
        """The step whose inputs `rows` has laid out. The same result as _execute's."""
        began = time.perf_counter_ns()
        batch, recorded = self._batch, self.recorded
        assert batch is not None and isinstance(recorded, RecordedModel)
        self._copy_blocks(plan)
        recorded.replay(rows.num_tokens, len(rows), rows.num_draws, plain=rows.plain)
        logprobs: list[float] = []
        top: list[TopTokens] = []
        found_at = recorded.likeliest_at
        if found_at is not None:
            taken = rows.settle(found_at)
        else:
            logits = Logits(recorded.logits, recorded.most_logits, recorded.likeliest())
            found = self._host_sampler.sample(batch, rows.draws, NO_MASKS, logits)
            taken = rows.settle(found.tokens.ctypes.data)
            logprobs = [found.logprobs[place] for place in taken.places.tolist()]
            top = [found.top[place] for place in taken.places.tolist()] if found.top else []
        self._last_done = done = time.perf_counter_ns()
        forward_ns, total_ns = done - began, done - started
        if self.group.rank:
            return StepResult(plan.epoch, plan.sequence, forward_ns=forward_ns, total_ns=total_ns)
        return StepResult(
            plan.epoch,
            plan.sequence,
            taken.row_ids,
            taken.token_ids,
            logprobs or [0.0] * len(taken.row_ids),
            taken.ends,
            top,
            forward_ns=forward_ns,
            total_ns=total_ns,
            num_drafts=rows.num_drafts,
        )

    def _logits(self, before_draws: torch.Tensor, first: int) -> torch.Tensor | None:
        """Of as many of these hidden states as get logits at once, or all that are left, from place
        `first` on."""
        if isinstance(self.recorded, RecordedModel):
            return self.recorded.logits(first)
        return self.model.logits(before_draws[first : first + self._logits_rows])

    def _prompt_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        logits = self.model.logits(hidden)
        self.heartbeat.beat()
        return logits

    def _copy_blocks(self, plan: StepPlan) -> None:
        assert self._kv_cache is not None
        if not plan.copies:
            return
        pairs = np.array(plan.copies, np.int64)
        if isinstance(self.recorded, GraphedModel):
            sources, targets = self.recorded.staging.upload([pairs[:, 0], pairs[:, 1]])
        else:
            sources, targets = torch.from_numpy(pairs).to(self._kv_cache.data.device).unbind(1)
        self._kv_cache.copy_blocks(sources, targets)

    def _finisher(
        self,
        scheduled: ScheduledRows,
        draws: Draws,
        sampled: Callable[[], Sampled],
        masks: Masks,
        clock: StepClock,
    ) -> Callable[[], StepResult]:
        """Makes the step's result of its tokens, which the batch expects from now on."""
        assert self._batch is not None
        batch, slots = self._batch, draws.slots
        row_ids, expected = batch.ids[slots], batch.expect(scheduled)

        def finish() -> StepResult:
            found = sampled()
            places, ends = batch.settle(expected, found.tokens)
            answer = clock.stopped(self._last_done)
            self._last_done = time.perf_counter_ns()
            self.heartbeat.busy = len(self._under_way) > 0
            if self.group.rank:
                return answer
            failures = {
                row: masks.failures[slot]
                for row, slot in zip(row_ids.tolist(), slots.tolist(), strict=True)
                if slot in masks.failures
            }
            return replace(
                answer,
                rows=row_ids[places].tolist(),
                token_ids=np.maximum(found.tokens[places], 0).tolist(),
                logprobs=[found.logprobs[place] for place in places.tolist()],
                ends=[ROW_ENDS[end] for end in ends.tolist()],
                top=[found.top[place] for place in places.tolist()] if found.top else [],
                failures=failures,
                num_drafts=int(expected.drafts.sum()),
            )

        return finish

    def _prepare_grammars(self, plan: StepPlan) -> None:
        """Has those of new rows compiled while steps run."""
        for row in plan.new_rows:
            if row.sampling.grammar and not self.group.rank:
                self._grammars.prepare(row.sampling.grammar)

    def _begin_masks(self, slots: IntArray) -> Callable[[], Masks]:
        """Has the masks of the rows that sample computed while the forward pass runs."""
        if self.group.rank:
            return lambda: NO_MASKS
        assert self._batch is not None
        return self._grammars.begin(self._batch.constrained_rows(slots))


_Prepared = tuple[ScheduledRows, StepInputs | None]  # no inputs without rows
