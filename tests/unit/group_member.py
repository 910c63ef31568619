"""One rank of the group in test_distributed.py, which runs this module. Ends with "ok"."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from headgate.kernels import ops
from headgate.shard.distributed import Group, ProcessGroup, init_group
from headgate.shard.errors import PeerLost

HANGS = os.environ.get("LAST_RANK") == "hangs"  # otherwise it dies
TIMEOUT = 1.0  # seconds, of a collective with a rank that hangs


def values(rank: int) -> torch.Tensor:
    return torch.randn(37, 5, generator=torch.Generator().manual_seed(rank))


def check_norm_of_parts(parts: torch.Tensor, total: torch.Tensor) -> None:
    """The norm that adds the ranks' parts gives the bits of the norm of their sum."""
    residual = torch.linspace(-1, 1, total.numel()).view_as(total)
    weight = torch.linspace(0, 2, total.shape[1])
    for kernels in ("reference", "triton"):
        ops.use(kernels)
        of_parts = ops.rms_norm_residual(parts.clone(), residual.clone(), weight, 1e-5)
        of_sum = ops.rms_norm_residual(total.clone(), residual.clone(), weight, 1e-5)
        for ours, theirs in zip(of_parts, of_sum, strict=True):
            assert torch.equal(ours, theirs), kernels


def check_collectives(group: Group) -> None:
    ranks = range(group.world_size)
    expected = values(0)
    for rank in ranks[1:]:
        expected = expected + values(rank)
    assert torch.equal(group.all_reduce(values(group.rank)), expected), "sum in rank order"

    assert torch.equal(group.parts(values(group.rank)), expected), "a sum, on CPUs"
    gathering = ProcessGroup(group.rank, group.world_size, gathers=True)
    parts = gathering.parts(values(group.rank))
    assert torch.equal(parts, torch.stack([values(rank) for rank in ranks])), "in rank order"
    if group.world_size == 2:  # with three, adding the parts is tested in one process
        check_norm_of_parts(parts, expected)

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


def main() -> None:
    group = init_group("cpu", timeout=20, shared_memory=False)
    last = group.world_size - 1
    if not HANGS:
        check_collectives(group)
    group.barrier()
    if HANGS:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))

    if group.rank == last:
        print("ok", flush=True)
        time.sleep(TIMEOUT + 5 if HANGS else 0)
        os._exit(0)  # as if killed: nobody is told
    try:
        for _ in range(100):
            group.all_reduce(values(0))
    except PeerLost as error:
        assert f"shard {group.rank} lost shard {last} in a" in str(error), error
        print("ok", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
