"""What the engine needs of a shard group: an epoch, plans in, results out. No implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from headgate.proto.messages import StepPlan, StepResult


class GroupBroken(Exception):
    """The shard group cannot go on. `rank` is the shard at fault."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank = rank
        self.reason = reason


class ShardGroup(Protocol):
    """The shards of one epoch, ready for steps (shard_client.ShardedClient)."""

    @property
    def epoch(self) -> int: ...

    async def send(self, plans: Sequence[StepPlan]) -> None:
        """To every shard, in one message. Raises GroupBroken."""

    def receive(self) -> StepResult | None:
        """The next result that all ranks have answered; None: not yet. Raises GroupBroken."""

    def on_result(self, callback: Callable[[], None]) -> None:
        """`callback` is called when `receive` has something to say."""
