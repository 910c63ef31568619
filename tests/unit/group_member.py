"""One rank of the group in test_distributed.py, which runs this module. Ends with "ok"."""

from __future__ import annotations

import os

import torch

from headgate.shard.distributed import ProcessGroup, init_group
from headgate.shard.errors import PeerLost


def values(rank: int) -> torch.Tensor:
    return torch.randn(37, 5, generator=torch.Generator().manual_seed(rank))


def main() -> None:
    group = init_group("cpu", timeout=20, shared_memory=False)
    ranks = range(group.world_size)

    expected = values(0)
    for rank in ranks[1:]:
        expected = expected + values(rank)
    assert torch.equal(group.all_reduce(values(group.rank)), expected), "sum in rank order"

    assert torch.equal(group.parts(values(group.rank)), expected), "a sum, on CPUs"
    gathering = ProcessGroup(group.rank, group.world_size, gathers=True)
    parts = gathering.parts(values(group.rank))
    assert torch.equal(parts, torch.stack([values(rank) for rank in ranks])), "in rank order"

    sizes = [3 - rank for rank in ranks]
    part = torch.full((2, sizes[group.rank]), float(group.rank))
    joined = group.gather_to_rank0(part, 1, sizes)
    if group.rank == 0:
        assert joined is not None
        assert joined[1].tolist() == [float(rank) for rank in ranks for _ in range(sizes[rank])]
    else:
        assert joined is None

    assert group.broadcast(torch.tensor([group.rank + 5])).item() == 5
    assert group.min(10 - group.rank) == 10 - ranks[-1]
    group.barrier()

    if group.rank == ranks[-1]:
        print("ok", flush=True)
        os._exit(0)  # as if killed: nobody is told
    try:
        for _ in range(100):
            group.all_reduce(values(0))
    except PeerLost as error:
        assert f"shard {group.rank} lost shard {ranks[-1]} in a" in str(error), error
        print("ok", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
