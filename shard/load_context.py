"""LoadContext: what layers need while a model is built: the weights, and this rank's part of them.

It decides nothing; Partition does.
"""

from __future__ import annotations

from dataclasses import dataclass

from headgate.shard.distributed import Group
from headgate.shard.model_config import ModelConfig
from headgate.shard.partition import Help, Partition
from headgate.shard.weights import Weights


@dataclass(frozen=True, slots=True)
class LoadContext:
    """One rank's view of the checkpoint that is being loaded."""

    config: ModelConfig
    weights: Weights
    partition: Partition
    group: Group
    max_positions: int  # longest sequence the server admits: the length of position tables

    @property
    def heads(self) -> range:
        return self.partition.heads[self.group.rank]

    @property
    def kv_heads(self) -> range:
        return self.partition.kv_heads[self.group.rank]

    @property
    def helped(self) -> tuple[Help | None, ...]:
        return self.partition.helped

    @property
    def mlp_columns(self) -> range:
        return self.partition.mlp_columns[self.group.rank]

    @property
    def vocabulary(self) -> range:
        return self.partition.vocabulary[self.group.rank]
