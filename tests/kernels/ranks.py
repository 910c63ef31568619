"""Ranks of one process, for operations that make a sum with their peers."""

from __future__ import annotations

from collections.abc import Callable

import torch


class OneOfSeveral:
    """A rank whose peers say what they are told to."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.others: torch.Tensor | int = 0
        self.own = torch.empty(0)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.own = tensor.clone()
        tensor += self.others
        return tensor


def of_ranks(
    count: int, operation: Callable[[int, OneOfSeveral], torch.Tensor]
) -> list[torch.Tensor]:
    """What an operation with one sum gives each rank: it is told what all others have said."""
    ranks = [OneOfSeveral(rank, count) for rank in range(count)]
    for rank in ranks:
        operation(rank.rank, rank)
    for rank in ranks:
        rank.others = sum(other.own for other in ranks if other is not rank)
    return [operation(rank.rank, rank) for rank in ranks]
