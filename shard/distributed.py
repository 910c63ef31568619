"""Group: the collectives between the shards of one model, and the one-rank group that needs none.

gloo on CPUs, NCCL on GPUs; CPU shards on one host meet by gloo and then share memory, where a
collective costs far less. Sums are taken in rank order for every element, whatever its place in
the tensor, so all ranks hold the same bits and a row's sum does not depend on the rows beside it.
A failed collective is a PeerLost: the group is finished and is never used again. Nothing here
decides what to do about it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from headgate.shard.errors import PeerLost
from headgate.shard.partition import Help
from headgate.shard.shared_memory import SharedMemory, open_shared_memory

_GRACE = 3.0  # seconds within which a rank that lives notices that a collective has failed
_PAUSE = 0.05
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Group:
    """The ranks that share a model. All of them must make the same calls in the same order."""

    hands_over = False  # whether there is a `hand_over` that is worth its cost

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the ranks, in place; returns it."""
        return tensor

    def parts(self, tensor: torch.Tensor) -> torch.Tensor:
        """Either the sum, as `all_reduce` gives it, or [world_size, ..]: all ranks' tensors, which
        whoever reads them adds in this order (ops.rms_norm_residual does, on its way)."""
        return self.all_reduce(tensor)

    def gather_to_rank0(
        self, tensor: torch.Tensor, dim: int, sizes: Sequence[int], needless: int = 0
    ) -> torch.Tensor | None:
        """Joins the ranks' tensors, `sizes[rank]` long in `dim`, along it; None beyond rank 0.

        needless: 1, on all ranks, where what comes may be anything.
        """
        return tensor

    def hand_over(self, helped: Sequence[Help | None], part: torch.Tensor) -> torch.Tensor:
        """What rank r is helped with, `helped[r]`, goes to it from its helper. `part`[T, columns]:
        of a helper, what it made for others, side by side in their order; of one that is helped,
        its own columns; of others, any T rows.

        Returns `part`, with what was made for this rank on its right where it is helped.
        """
        assert not any(helped), "only where `hands_over` says so"
        return part

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies rank 0's `tensor` into everyone's, in place; returns it."""
        return tensor

    def min(self, value: int) -> int:
        """The smallest of all ranks' values: the vote before a step, the number of KV blocks."""
        return value

    def barrier(self) -> None:
        """Waits until every rank is here."""

    def close(self) -> None:
        """Leaves the group. Further calls are errors."""


class RollCall:
    """Finds out which ranks are gone once a collective has failed: torch.distributed doesn't say.

    Whoever notices writes its name into the store where the group met; those that have not done so
    within a grace are the ones that are lost. The store is rank 0's.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = dist.PrefixStore("roll-call", store)
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]

    def missing(self) -> list[int]:
        """The ranks that are lost; takes up to a few seconds."""
        absent, deadline = list(self._others), time.monotonic() + _GRACE
        try:
            self._store.set(str(self._rank), "here")
            while absent and time.monotonic() < deadline:
                absent = [other for other in absent if not self._store.check([str(other)])]
                time.sleep(_PAUSE)
        except RuntimeError:  # the store is gone, and with it its process
            return [0]
        return absent


class ProcessGroup(Group):
    """A Group over torch.distributed's default process group."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        roll_call: RollCall | None = None,
        *,
        gathers: bool = False,
    ) -> None:
        """gathers: whether `parts` leaves the sum to its reader."""
        super().__init__(rank, world_size)
        self._roll_call = roll_call
        self._gathers = gathers

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._collective():
            if self.world_size == 2:  # a + b is b + a: any algorithm gives the sum in rank order
                dist.all_reduce(tensor)
                return tensor
            parts = [
                torch.empty_like(tensor, memory_format=torch.contiguous_format)
                for _ in range(self.world_size)
            ]
            dist.all_gather(parts, tensor.contiguous())
        first, *others = parts
        tensor.copy_(first)
        for part in others:
            tensor += part
        return tensor

    def parts(self, tensor: torch.Tensor) -> torch.Tensor:
        """On GPUs the tensors: gathering them is one call of NCCL, and adding them costs no pass of
        its own. Two ranks move as many bytes as for a sum; more move what `all_reduce` moves."""
        if not self._gathers:
            return self.all_reduce(tensor)
        gathered = tensor.new_empty((self.world_size, *tensor.shape))
        with self._collective():
            dist.all_gather_into_tensor(gathered.flatten(0, 1), tensor.contiguous())
        return gathered

    def gather_to_rank0(
        self, tensor: torch.Tensor, dim: int, sizes: Sequence[int], needless: int = 0
    ) -> torch.Tensor | None:
        dim %= tensor.dim()
        longest = max(sizes)
        # A gather moves equal shapes, so the shorter ones travel padded.
        padded = tensor.contiguous()
        if tensor.shape[dim] < longest:
            padded = tensor.new_empty((*tensor.shape[:dim], longest, *tensor.shape[dim + 1 :]))
            padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        parts = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        with self._collective():
            dist.gather(padded, parts, dst=0)
        if parts is None:
            return None
        return torch.cat(
            [part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim
        )

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._collective():
            dist.broadcast(tensor, src=0)
        return tensor

    def min(self, value: int) -> int:
        smallest = torch.tensor([value], dtype=torch.int64)
        with self._collective():
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    def barrier(self) -> None:
        self.min(0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            lost = f"shard {self.rank} lost {self._lost_peers()} in a collective: {reason}"
            raise PeerLost(lost) from error

    def _lost_peers(self) -> str:
        if self.world_size == 2:  # there is only one it can be
            return f"shard {1 - self.rank}"
        missing = self._roll_call.missing() if self._roll_call is not None else []
        if not missing:
            return "another shard"
        return f"shard{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"


class SharedMemoryGroup(ProcessGroup):
    """A Group of CPU shards on one host. What shared memory does not take goes through gloo."""

    hands_over = True

    def __init__(self, rank: int, world_size: int, memory: SharedMemory) -> None:
        super().__init__(rank, world_size)
        self._memory = memory

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._memory.sum(tensor) else super().all_reduce(tensor)

    def gather_to_rank0(
        self, tensor: torch.Tensor, dim: int, sizes: Sequence[int], needless: int = 0
    ) -> torch.Tensor | None:
        return self._memory.gather(tensor, dim % tensor.dim(), sizes, needless)

    def hand_over(self, helped: Sequence[Help | None], part: torch.Tensor) -> torch.Tensor:
        return self._memory.hand_over(helped, part)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self._memory.broadcast(tensor)
        return tensor

    def min(self, value: int) -> int:
        return self._memory.min(value)

    def close(self) -> None:
        self._memory.close()
        super().close()


def single_group() -> Group:
    """The group of one rank, in which nothing is exchanged."""
    return Group(0, 1)


def init_group(
    device: str,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    *,
    shared_memory: bool = True,
) -> Group:
    """Joins the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Returns when all ranks have joined. `timeout`, in seconds, bounds this and each collective.
    Without `shared_memory` shards on one host use torch.distributed alone.
    Raises PeerLost when the others don't come.
    """
    environment = os.environ if environment is None else environment
    rank, world_size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if world_size == 1:
        return single_group()
    address = environment.get("MASTER_ADDR", "127.0.0.1")
    if address in _LOOPBACK:
        _bind_gloo_to_loopback()
    # Votes are always CPU tensors, so gloo is there beside NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    limit = timedelta(seconds=timeout)
    try:
        port = int(environment["MASTER_PORT"])
        store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=limit)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PeerLost(f"shard {rank} could not join {world_size - 1} others: {reason}") from error
    roll_call = RollCall(store, rank, world_size)
    group = ProcessGroup(rank, world_size, roll_call, gathers=device.startswith("cuda"))
    if shared_memory and device == "cpu" and address in _LOOPBACK:
        memory = open_shared_memory(group, timeout)
        if memory is not None:
            return SharedMemoryGroup(rank, world_size, memory)
    return group


def _bind_gloo_to_loopback() -> None:
    """On one host gloo need not look up the host's name, which containers often can't resolve."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
