"""The real scheduler and the real model runner joined in one process, without sockets or text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headgate.kernels import ops
from headgate.proto.messages import Pooling, RowSampling
from headgate.router.request import Request
from headgate.router.scheduler import Scheduler, SchedulerConfig
from headgate.shard.config import ShardConfig, ShardIdentity
from headgate.shard.distributed import single_group
from headgate.shard.model_runner import ModelRunner
from headgate.shard.models.registry import load_model

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Job:
    """A request; `output_ids` were generated before its shards were lost."""

    prompt_ids: Sequence[int]
    sampling: RowSampling
    output_ids: Sequence[int] = ()


@dataclass(slots=True)
class Answer:
    """All output tokens, and the logprobs of those computed here; or the pooled prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pooled: list[float] = field(default_factory=list)


class Server:
    """Serves requests from one checkpoint; the scheduler's limits are set by `limits`."""

    def __init__(
        self,
        checkpoint: Path,
        max_total_tokens: int = 512,
        quantize: str = "",
        kv_cache_dtype: str = "float32",
        kernels: str = "",
    ) -> None:
        """`kernels`: the back end, which stays in use; "": the best there is."""
        self._config = ShardConfig(
            model_path=str(checkpoint),
            dtype="bfloat16",
            device="cpu",
            num_threads=1,
            max_batch_prefill_tokens=1024,
            max_batch_size=128,
            max_total_tokens=max_total_tokens,
            addresses=("unix:unused",),
            block_size=BLOCK_SIZE,
            num_blocks=1024,
            quantize=quantize,
            kv_cache_dtype=kv_cache_dtype,
        )
        ops.use(kernels, "cpu")
        group = single_group()
        model = load_model(
            checkpoint, dtype="bfloat16", device="cpu", group=group, quantize=quantize
        )
        self._runner = ModelRunner(model, group, self._config, ShardIdentity(0, 1, 1))
        self._runner.record()
        self.limits()

    def limits(
        self, num_blocks: int = 1024, step_tokens: int = 1024, kv_overcommit: float = 0.1
    ) -> None:
        """Starts afresh with these limits: cold caches, no rows."""
        self._runner.allocate(num_blocks)
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_size=BLOCK_SIZE,
                max_batch_prefill_tokens=step_tokens,
                max_total_tokens=self._config.max_total_tokens,
                kv_overcommit=kv_overcommit,
            )
        )
        self._sequence = 0
        self._next_id = 1

    def serve(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answers of jobs that all arrive at once, planned one step ahead."""
        answers: dict[int, Answer] = {}
        for job in jobs:
            request = Request(
                self._next_id,
                job.prompt_ids,
                job.sampling,
                arrival=self._next_id,
                skip_prefix_cache=job.sampling.pooling is Pooling.MEAN,
            )
            request.output_ids.extend(job.output_ids)
            self._next_id += 1
            self.scheduler.add(request)
            answers[request.id] = Answer(list(job.output_ids))
        in_flight: deque = deque()
        while self.scheduler.has_work() or in_flight:
            plan = self.scheduler.schedule(1, self._sequence + 1)
            if plan is not None:
                self._sequence += 1
                in_flight.append(plan)
            if len(in_flight) == 2 or plan is None:
                result = self._runner.step(in_flight.popleft())
                assert not result.refused, result.refused
                for output in self.scheduler.update(result):
                    answers[output.request.id].pooled += output.pooled or ()
                    if output.token_id is not None:
                        answers[output.request.id].token_ids.append(output.token_id)
                        answers[output.request.id].logprobs.append(output.logprob)
            self.scheduler.check_integrity()
        assert self.scheduler.stats.blocks_used == 0
        return list(answers.values())
