"""What the shard's service asks of its runner: ModelRunner computes, NullRunner only answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from headgate.proto.messages import StepPlan
from headgate.shard.config import ShardConfig, ShardIdentity
from headgate.shard.pending_step import PendingStep


@dataclass(frozen=True, slots=True)
class RunnerFacts:
    """What a shard tells of its model."""

    model_type: str
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int  # on this rank
    kv_bytes_per_block: int  # on this rank


class Heartbeat:
    """Signs of life, given by the model's thread and read by another."""

    def __init__(self) -> None:
        self._beats = ctypes.c_int64(0)
        self.busy = False  # a step is being computed

    @property
    def beats(self) -> int:
        """Stands still while the model hangs or has nothing to do."""
        return self._beats.value

    @property
    def address(self) -> int:
        """Of the counter, an int64, for C++ to beat."""
        return ctypes.addressof(self._beats)

    def beat(self) -> None:
        self._beats.value += 1


class Runner(Protocol):
    """One rank. All methods but prepare_grammar are called from one thread."""

    config: ShardConfig
    identity: ShardIdentity
    heartbeat: Heartbeat

    @property
    def facts(self) -> RunnerFacts: ...

    def warm_up(self, max_tokens: int, max_rows: int) -> int:
        """Runs the largest steps; the number of KV blocks that fit."""

    def allocate(self, num_blocks: int) -> None:
        """Makes the KV cache; drops the one before it, and all rows."""

    def prepare_grammar(self, source: str) -> None:
        """Compiles a grammar that rows will have; returns when it is done. For any thread."""

    def rest(self) -> bool:
        """Does a little of what steps would have to do later; False where nothing is left of it."""

    def reset(self) -> None:
        """Drops all rows: a new stream of plans begins."""

    def begin(self, plan: StepPlan, is_current: Callable[[], bool], problem: str) -> PendingStep:
        """The plan's result, or its promise; see ModelRunner.begin."""
