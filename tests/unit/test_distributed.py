"""Collectives over real processes, the loss of one of them, and the group of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headgate.shard.distributed import init_group, single_group
from headgate.shard.errors import PeerLost

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_and_a_lost_peer(world_size: int) -> None:
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    members = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.group_member"],
            cwd=REPOSITORY,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        assert [member.communicate(timeout=60)[0] for member in members] == ["ok\n"] * world_size
    finally:
        for member in members:
            member.kill()


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
