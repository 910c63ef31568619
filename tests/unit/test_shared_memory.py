"""Collectives through shared memory: between processes, and between threads where one fails."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.kernels.cpu import library
from headgate.shard import shared_memory
from headgate.shard.distributed import Group
from headgate.shard.errors import PeerLost
from headgate.shard.partition import Help
from headgate.shard.shared_memory import SharedMemory, open_shared_memory
from tests.unit.group_processes import outputs_of


@pytest.fixture(autouse=True)
def compiled() -> None:
    if library.load() is None:
        pytest.skip("the C++ kernels are not built")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_between_processes(world_size: int) -> None:
    assert outputs_of("tests.unit.shared_memory_member", world_size) == ["ok\n"] * world_size


class ThreadGroup(Group):
    """A group whose ranks are threads of this process."""

    def __init__(self, rank: int, world_size: int, meeting: threading.Barrier, table: list[Any]):
        super().__init__(rank, world_size)
        self._meeting, self._table = meeting, table

    def _exchange(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._meeting.wait(30)
        values = list(self._table)
        self._meeting.wait(30)
        return values

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._exchange(tensor)[0]  # type: ignore[no-any-return]

    def min(self, value: int) -> int:
        return min(self._exchange(value))


def run_ranks(
    world_size: int, work: Callable[[int, SharedMemory | None], object], timeout: float = 30
) -> list[Any]:
    """What `work(rank, memory)` returned or raised, by rank."""
    meeting, table = threading.Barrier(world_size), [None] * world_size

    def run(rank: int) -> object:
        memory = open_shared_memory(ThreadGroup(rank, world_size, meeting, table), timeout)
        try:
            return work(rank, memory)
        except PeerLost as error:
            return str(error)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def test_a_rank_that_does_not_come_in_time_frees_all() -> None:
    def work(rank: int, memory: SharedMemory | None) -> None:
        assert memory is not None
        if rank != 1:
            memory.min(0)

    told = "lost shard 1 in a collective: it did not come in time"
    assert run_ranks(3, work, timeout=1) == [f"shard 0 {told}", None, f"shard 2 {told}"]


def test_a_rank_that_left() -> None:
    def work(rank: int, memory: SharedMemory | None) -> None:
        assert memory is not None
        memory.min(0)
        if rank == 0:
            memory.close()
        else:
            for _ in range(2):  # a group that has failed stays so
                with pytest.raises(PeerLost):
                    memory.min(0)
            memory.min(0)

    told = "shard 1 lost shard 0 in a collective: it left the group"
    assert run_ranks(2, work) == [None, told]


def test_different_calls_are_told_from_each_other() -> None:
    def work(rank: int, memory: SharedMemory | None) -> None:
        assert memory is not None
        memory.sum(torch.ones(4 + rank))

    for told in run_ranks(2, work, timeout=5):
        assert "made different collectives" in told


def test_a_row_that_no_slot_takes_is_not_handed_over() -> None:
    def work(rank: int, memory: SharedMemory | None) -> None:
        assert memory is not None
        with pytest.raises(ValueError, match=r"has 4000000 bytes, and a slot .* takes \d+$"):
            memory.hand_over([Help(1, 1_000_000), None], torch.ones(1, 8))

    assert run_ranks(2, work) == [None, None]


def test_sums_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    parts = [torch.randn(700, 576, generator=torch.Generator().manual_seed(r)) for r in range(3)]

    def work(rank: int, memory: SharedMemory | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert memory is not None
        together, alone = parts[rank].clone(), parts[rank][500].clone()
        assert memory.sum(together) and memory.sum(alone)
        assert not memory.sum(alone.half())
        return together[500], alone

    rows = [row for pair in run_ranks(3, work) for row in pair]
    assert all(torch.equal(row, rows[0]) for row in rows)


def full(fd: int, offset: int, length: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("missing", [False, True])
def test_without_room_there_is_one_line_and_none(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if missing:
        monkeypatch.setattr(shared_memory, "DIRECTORY", tmp_path / "missing")
    else:
        monkeypatch.setattr(shared_memory, "DIRECTORY", tmp_path)
        monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level(logging.INFO):
        assert run_ranks(2, lambda rank, memory: memory) == [None, None]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert ("No such file" if missing else "No space left") in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_memory_fits_small_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(shared_memory, "_map_together", lambda group, size: sizes.append(size))
    for world_size in (2, 3, 8, 16):
        assert run_ranks(world_size, lambda rank, memory: memory) == [None] * world_size
    assert min(sizes) >= 2 << 20 and max(sizes) <= 8 << 20
