"""One rank of the groups in test_shared_memory.py, which runs this module. Ends with "ok"."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import torch

from headgate.shard.distributed import Group, SharedMemoryGroup, init_group
from headgate.shard.errors import PeerLost
from headgate.shard.partition import Help

# Below and above what is summed by everyone, what one round takes, and all of the memory.
SIZES = [1, 576, 1000, 32 * 576 + 3, 200_001, 2_500_000]


def values(rank: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + size))


def check_sums(group: Group) -> None:
    for size in SIZES:
        expected = values(0, size)
        for rank in range(1, group.world_size):
            expected = expected + values(rank, size)
        summed = values(group.rank, size)
        assert group.all_reduce(summed) is summed
        assert torch.equal(summed, expected), f"sum of {size} in rank order"
    rows = values(group.rank, 1000)[-576:].clone()
    apart = torch.stack((rows, rows), 1)[:, 0]  # every second element
    assert torch.equal(group.all_reduce(apart), group.all_reduce(rows))

    ballots = torch.zeros(group.world_size, dtype=torch.int64)
    ballots[group.rank] = 2**40 + group.rank
    expected_ballots = [2**40 + rank for rank in range(group.world_size)]
    assert group.all_reduce(ballots).tolist() == expected_ballots
    halves = torch.full((3,), 0.5, dtype=torch.bfloat16)  # not a dtype of the C++
    assert group.all_reduce(halves).tolist() == [group.world_size / 2] * 3


def check_others(group: Group) -> None:
    ranks = range(group.world_size)
    for rows, unit in ((2, 1), (7, 40_003)):
        sizes = [(3 - rank % 3) * unit for rank in ranks]
        parts = [values(rank, rows * size).view(rows, size) for rank, size in enumerate(sizes)]
        joined = group.gather_to_rank0(parts[group.rank], 1, sizes)
        assert joined is None if group.rank else torch.equal(joined, torch.cat(parts, 1))
        by_rows = [part.T for part in parts]
        joined = group.gather_to_rank0(by_rows[group.rank], -2, sizes)
        assert joined is None if group.rank else torch.equal(joined, torch.cat(by_rows))
    for size in SIZES:
        assert torch.equal(group.broadcast(values(group.rank, size)), values(0, size))
    assert group.broadcast(torch.arange(5) + group.rank).tolist() == [0, 1, 2, 3, 4]
    assert group.min(10 - group.rank) == 10 - ranks[-1]
    group.barrier()


def check_help(group: Group) -> None:
    """The last rank helps all others, or one only; of some rows, and of more than a slot takes."""
    last = group.world_size - 1
    for rows, unit in ((1, 1), (3, 5), (2000, 320)):
        everyone = [Help(last, (rank + 1) * unit) for rank in range(last)]
        for helped in ([*everyone, None], [everyone[0], *[None] * last]):
            made = [values(rank, rows * help.columns) for rank, help in enumerate(helped) if help]
            gifts = [part.view(rows, -1) for part in made]
            own = values(10 + group.rank, rows * 7).view(rows, 7)
            if group.rank == last:
                part = torch.cat(gifts, 1)
                assert group.hand_over(helped, part) is part
            elif helped[group.rank]:
                joined = group.hand_over(helped, own)
                assert torch.equal(joined, torch.cat((own, gifts[group.rank]), 1))
            else:
                assert group.hand_over(helped, own) is own


def check_mixed(group: Group) -> None:
    """Ranks that run ahead of each other, as after a gather and before a broadcast."""
    generator = torch.Generator().manual_seed(group.rank)
    for step in range(200):
        if torch.rand((), generator=generator) < 0.05:
            time.sleep(0.0005)
        total = group.all_reduce(torch.full((64,), float(step + group.rank)))
        assert total[0] == step * group.world_size + sum(range(group.world_size))
        group.gather_to_rank0(total, 0, [64] * group.world_size)
        helped = [None, *[Help(0, 1)] * (group.world_size - 1)]
        given = group.hand_over(helped, made_by(group, step))
        assert group.rank == 0 or given.tolist() == [[-1.0, step + group.rank]]
        assert group.broadcast(torch.tensor([step + group.rank])).item() == step


def made_by(group: Group, step: int) -> torch.Tensor:
    """Rank 0 has made for each other rank the sum of `step` and that rank."""
    if group.rank:
        return torch.tensor([[-1.0]])
    return torch.arange(1.0, group.world_size)[None] + step


def check_nothing_left() -> None:
    maps = Path("/proc/self/maps").read_text()
    names = re.findall(r"(/dev/shm/headgate-[0-9a-f]{32}) \(deleted\)", maps)
    assert names and not any(Path(name).exists() for name in names)


def check_asleep(group: Group) -> None:
    """Waiting for a peer takes no processor time."""
    if group.rank == 0:
        time.sleep(0.5)
    started = time.process_time()
    group.barrier()
    assert group.rank == 0 or time.process_time() - started < 0.1


def main() -> None:
    torch.set_num_threads(1)
    group = init_group("cpu", timeout=60)
    assert isinstance(group, SharedMemoryGroup)
    group.barrier()  # rank 0 takes the name away when it knows that all have the memory
    check_nothing_left()
    check_sums(group)
    check_others(group)
    check_help(group)
    check_mixed(group)
    check_asleep(group)
    last = group.world_size - 1
    if group.rank == last:
        print("ok", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)  # it stays a zombie until all have ended
    started = time.monotonic()
    try:
        for _ in range(100):
            group.all_reduce(values(0, 576))
    except PeerLost as error:
        told = f"shard {group.rank} lost shard {last} in a collective: its process ended"
        assert str(error) == told, error
        assert time.monotonic() - started < 5
        print("ok", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
