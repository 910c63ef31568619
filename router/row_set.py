"""Every unfinished request: those that run, with their blocks and rows, and those that wait.

It moves requests between the two and ends them. Who runs, and when, is the scheduler's decision.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection

from headgate.router.beam_rows import BeamGroup
from headgate.router.kv_cache_manager import KVCacheManager
from headgate.router.outstanding_steps import OutstandingStep
from headgate.router.request import Request, RequestStatus
from headgate.router.waiting_queue import WaitingQueue


class RowSet:
    """The attributes are for reading."""

    def __init__(self, kv: KVCacheManager) -> None:
        self._kv = kv
        self._requests: dict[int, Request] = {}
        self._searches: dict[int, Request] = {}  # beam searches, by the id of their first row
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # in order of service
        self.removed: list[int] = []  # rows the shards still hold for nothing
        self.preemptions = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._requests

    def find(self, request_id: int) -> Request | None:
        """A request that is unfinished; a beam search by its first row."""
        return self._requests.get(request_id) or self._searches.get(request_id)

    # ------------------------------------------------------------ coming and going

    def add(self, request: Request) -> None:
        """A new one waits."""
        request.status = RequestStatus.WAITING
        if request.beams is not None:
            self._searches[request.id] = request
        self._requests[request.id] = request
        self.waiting.add(request)

    def end(self, request: Request, reason: str) -> None:
        """All of its beams end with it."""
        for row in [request] if request.beams is None else request.beams.members:
            if row.id in self._requests:
                self._drop(row)
            self._searches.pop(row.id, None)
            row.status = RequestStatus.FINISHED
            row.finish_reason = reason

    def _drop(self, row: Request) -> None:
        if row.is_running:
            self.leave(row)
        else:
            self.waiting.remove(row)
        del self._requests[row.id]

    def start(self, row: Request, num_computed: int) -> None:
        """It runs from now on, with a table and this many positions computed."""
        row.status = RequestStatus.RUNNING
        row.num_prefill_tokens = row.num_tokens
        row.num_scheduled = row.num_confirmed = num_computed
        insort(self.running, row, key=order_of)

    def leave(self, request: Request) -> None:
        """Takes a running request's blocks and row away. Its tokens in flight may still come."""
        index = bisect_left(self.running, request.order, key=order_of)
        assert self.running[index] is request
        del self.running[index]
        self._kv.free(request)
        self._remove_row(request)
        request.num_scheduled = request.num_confirmed = 0
        request.fork_of, request.copies = None, []

    def _remove_row(self, request: Request) -> None:
        """The shards are to forget it."""
        if request.row_sent:
            self.removed.append(request.id)
        request.row_sent = False

    def take_over(self, row: Request) -> int:
        """A row in the middle of its prompt goes on from where others have got with the same
        tokens, if they are further; as a new row to the shards. Returns the positions gained.
        """
        num_computed = self._kv.take_over(row)
        if not num_computed:
            return 0
        self._remove_row(row)
        gained = num_computed - row.num_scheduled
        row.num_scheduled = row.num_confirmed = num_computed
        return gained

    def requeue(self, request: Request) -> None:
        """One that has left waits again, at its place."""
        request.status = RequestStatus.PREEMPTED
        self.waiting.add(request)

    def preempt(self, request: Request) -> None:
        """It gives way; so do its other beams, which could not go on without it."""
        together = [request]
        if request.beams is not None:
            together = request.beams.running
        assert self.running[0] not in together, "the first in order would be preempted"
        self.give_way(together)

    def give_way(self, rows: list[Request]) -> None:
        """Running rows give up their KV, to be computed again later."""
        for row in rows:
            self.leave(row)
            self.requeue(row)
            row.preemptions += 1
            self.preemptions += 1

    def rewind(self, void: Collection[OutstandingStep]) -> None:
        """These plans, the last that were made, are void: running rows go back to what is confirmed
        and are to be sent anew. Those that began with KV from these plans wait again.
        """
        size = self._kv.block_size
        missing = {block for plan in void for block in plan.filled}
        lost = [row for plan in void for row in plan.forked]
        for row in self.running:
            if not missing.isdisjoint(row.block_ids[: row.num_confirmed // size]):
                lost.append(row)
        for first in lost:
            for row in [first] if first.beams is None else first.beams.running:
                if row.is_running:
                    self.leave(row)
                    self.requeue(row)
        self._kv.withdraw(missing)
        for row in self.running:
            row.num_scheduled = row.num_confirmed
            row.num_prefill_tokens = row.num_tokens
            row.num_published = min(row.num_published, row.num_confirmed // size)
            row.row_sent = False
        self.removed.clear()

    # ------------------------------------------------------------ beams

    def next_round(self, group: BeamGroup) -> bool:
        """Ends a complete round of beams: rows go on, fork or are free. False: the search is done,
        and nothing else is.
        """
        forks = group.next_round()
        if group.search.done:
            return False
        children = {fork.child.id for fork in forks}
        for row in group.members:
            if row.id in self._requests and (row.id in children or row not in group.ranked):
                self._drop(row)
                row.status = RequestStatus.WAITING  # to carry a beam again
        in_place = True
        for fork in forks:
            self._requests[fork.child.id] = fork.child
            in_place = self._fork(fork.child, fork.parent) and in_place
        if not in_place:  # then none stays: they need each other
            self.give_way(group.running)
        return True

    def _fork(self, child: Request, parent: Request) -> bool:
        """Starts a beam from the KV of another; False: there is no block for it, and it waits.

        Beams of running requests have been promised their memory, as rows that grow have.
        """
        if not parent.is_running:
            self.requeue(child)
            return True
        while (copies := self._kv.fork(parent, child, parent.num_scheduled)) is None:
            latest = self.running[-1]
            if latest.beams is parent.beams:
                self.requeue(child)
                return False
            self.preempt(latest)
        child.fork_of, child.copies = parent, copies
        child.first_scheduled = parent.first_scheduled
        self.start(child, parent.num_scheduled)
        return True

    # ------------------------------------------------------------ inspection

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        self._kv.check_integrity(self.running)
        assert self.running == sorted(self.running, key=order_of)
        assert list(self.waiting) == sorted(self.waiting, key=order_of)
        assert {*self.running, *self.waiting} == set(self._requests.values())
        for request in self.waiting:
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
            assert not request.block_ids and not request.row_sent
        for row in self.running:
            assert row.status is RequestStatus.RUNNING
            assert row.num_confirmed <= row.num_scheduled <= row.max_positions
            assert row.num_reserved <= len(row.block_ids) * self._kv.block_size
            assert row.row_sent or not row.in_flight or row.id in self.removed
            held = row.beams is not None  # until its other beams' tokens are known
            assert row.num_confirmed < row.num_tokens + held
            assert row.num_scheduled <= row.num_tokens or not row.lockstep
        for request in self._requests.values():
            if request.beams is not None:
                assert request in request.beams.ranked
                assert all(row.id in self._requests for row in request.beams.ranked)
        assert not set(self.removed) & {row.id for row in self.running if row.row_sent}

    def unfinished(self) -> list[Request]:
        return list(self._requests.values())


def order_of(request: Request) -> tuple[float, int]:
    """Sort key of service."""
    return request.order
