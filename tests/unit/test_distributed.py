"""Collectives over real processes, the loss of one of them, and the group of one."""

from __future__ import annotations

import pytest
import torch

from headgate.shard.distributed import init_group, single_group
from headgate.shard.errors import PeerLost
from tests.unit.group_processes import free_port, outputs_of


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_and_a_lost_peer(world_size: int) -> None:
    assert outputs_of("tests.unit.group_member", world_size) == ["ok\n"] * world_size


def test_the_group_of_one() -> None:
    group = single_group()
    tensor = torch.ones(2, 3)
    assert group.all_reduce(tensor) is tensor
    assert group.gather_to_rank0(tensor, 1, [3]) is tensor
    assert group.broadcast(tensor) is tensor
    assert group.min(4) == 4
    group.barrier()
    group.close()
    assert init_group("cpu", 1, {}).world_size == 1


def test_peers_that_do_not_come() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(PeerLost, match="shard 1 could not join 1 others"):
        init_group("cpu", 1, {**environment, "MASTER_PORT": str(free_port())})
