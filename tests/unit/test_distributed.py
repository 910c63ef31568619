"""Collectives over real processes, the loss of one of them, and the group of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from headgate.shard import distributed
from headgate.shard.distributed import ProcessGroup, RollCall, init_group, single_group
from headgate.shard.errors import PeerLost
from tests.unit.group_processes import free_port, outputs_of


@pytest.mark.parametrize(("world_size", "last_rank"), [(2, "dies"), (3, "dies"), (3, "hangs")])
def test_collectives_and_a_lost_peer(world_size: int, last_rank: str) -> None:
    pytest.importorskip("triton")
    outputs = outputs_of("tests.unit.group_member", world_size, LAST_RANK=last_rank)
    assert outputs == ["ok\n"] * world_size


def test_a_call_that_nccl_gives_up_names_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise dist.DistBackendError("NCCL error: remote process exited\nwith a trace")

    monkeypatch.setattr(dist, "all_gather_into_tensor", fails)
    store = dist.HashStore()
    dist.PrefixStore("roll-call", store).set("2", "here")
    of_two = ProcessGroup(0, 2, gathers=True)
    of_three = ProcessGroup(0, 3, RollCall(store, 0, 3), gathers=True)
    monkeypatch.setattr(distributed, "_GRACE", 0.1)
    for group in (of_two, of_three):
        with pytest.raises(PeerLost) as lost:
            group.parts(torch.ones(2, 2))
        told = "shard 0 lost shard 1 in a collective: NCCL error: remote process exited"
        assert str(lost.value) == told


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
