"""The vote before a step's first collective: all ranks run the plan, or none does.

It also finds out that two ranks hold different plans, which happens when a router dies after it
told one rank and not the other: a forward pass over different batches would hang or, worse, not.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import numpy as np
import torch

from headgate.proto.messages import StepPlan
from headgate.shard.distributed import Group

_PATIENCE = 20.0  # seconds within which a rank learns that its plan's sender is gone
_PAUSE = 0.02


class Superseded(Exception):
    """The plan comes from a stream that is no longer served. Nothing was computed."""


class PlansDiffer(RuntimeError):
    """The ranks hold different plans, and all are current."""


def plan_tag(plan: StepPlan) -> int:
    """31 bits that differ between plans the ranks might confuse."""
    content = np.array([plan.sequence, *plan.rows, *plan.counts], np.int64).tobytes()
    return zlib.crc32(content) & 0x7FFFFFFF


class Vote:
    """Taken by one rank of a group, again and again."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._ballots = torch.zeros(group.world_size, dtype=torch.int64)
        # NumPy's view of them: between two steps PyTorch's code is out of the caches, and slow.
        self._votes = self._ballots.numpy()

    def __call__(self, tag: int, willing: bool, is_current: Callable[[], bool]) -> list[int]:
        """The ranks that refuse the plan `tag`; none, and all run it.

        Raises Superseded when this rank's plan is the stale one, PlansDiffer when none gives way.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            self._votes[:] = 0
            self._votes[self._group.rank] = tag << 1 | willing
            self._group.all_reduce(self._ballots)
            votes = self._votes.tolist()
            if len({ballot >> 1 for ballot in votes}) == 1:
                return [rank for rank, ballot in enumerate(votes) if not ballot & 1]
            if not is_current():
                raise Superseded
            if time.monotonic() > deadline:
                raise PlansDiffer("the shards were sent different plans")
            time.sleep(_PAUSE)
