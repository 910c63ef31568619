"""One epoch of the shards: all of a group start together and end together.

It says when and why the group was lost; what to do then is the supervisor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headgate.launcher.process import CONFIGURATION_ERROR, Child, Exit

SpawnShard = Callable[[int, int], Child]  # (rank, epoch)

# Before the first ready, one shard's death makes its peers fail too; the one that can say why in a
# sentence may be a moment slower than a peer that only sees a broken connection.
_CONFESSION_SECONDS = 1.0
_CHECK_SECONDS = 0.5  # between looks at shards that start


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a group is over."""

    reason: str  # "shard-1 was killed by SIGKILL"
    child: Child | None = None  # the shard to blame, where one is
    end: Exit | None = None

    @property
    def is_final(self) -> bool:
        """Whether another try would end alike: configuration or model are at fault."""
        return self.end is not None and self.end.code == CONFIGURATION_ERROR

    @property
    def sentence(self) -> str:
        """For the user."""
        if self.child is not None and self.end is not None:
            return self.child.final_sentence(self.end)
        return self.reason


class ShardGroup:
    """The shard processes of one epoch. Create it on the event loop; then await `lost`."""

    def __init__(
        self,
        epoch: int,
        addresses: Sequence[str],
        spawn: SpawnShard,
        start_limit: float,
        hang_limit: float,
        meeting: socket.socket | None = None,
    ) -> None:
        """`start_limit`: seconds until it must be ready, `hang_limit`: that a shard may be
        suspended; `meeting`: reserves the port where the shards meet until they have."""
        self.epoch = epoch
        self.addresses = list(addresses)  # where each rank listens
        self.ready = False
        self.start_seconds = 0.0  # it took to be ready
        self._started = time.monotonic()
        self._meeting = meeting
        self._ends: list[tuple[Child, Exit]] = []  # in the order of their deaths
        self._judged = asyncio.Event()  # something is wrong
        self._reason = ""
        self.remove_sockets()
        self.children = [spawn(rank, epoch) for rank in range(len(addresses))]
        self._watchers = [asyncio.create_task(self._watch(child)) for child in self.children]
        self._start_limit = start_limit
        self._hang_limit = hang_limit
        self._suspended_since: float | None = None
        self._check_start()

    def mark_ready(self) -> None:
        """The router serves with this group: a first one, or one that was started again."""
        if not self.ready:
            self.ready = True
            self.start_seconds = time.monotonic() - self._started
        self._timer.cancel()
        self._release()

    @property
    def served_seconds(self) -> float:
        """How long it has been ready."""
        return time.monotonic() - self._started - self.start_seconds if self.ready else 0.0

    def blame(self, reason: str) -> None:
        """Declares the group lost though its processes may live: hung, or not ready in time."""
        if not self._judged.is_set():
            self._reason = reason
            self._judged.set()

    async def lost(self) -> Loss:
        """Waits until the group is over; no process of it is left then."""
        await self._judged.wait()
        self._timer.cancel()
        self._release()
        if not self.ready and not self._reason and len(self._watchers) > 1:
            await asyncio.wait(self._watchers, timeout=_CONFESSION_SECONDS)
        culprits = list(self._ends)
        self.kill()
        await asyncio.gather(*self._watchers)
        self.remove_sockets()
        if self._reason or not culprits:
            return Loss(self._reason)
        child, end = min(culprits, key=_blame_rank)  # stable: the first of equals
        return Loss(f"{child.name} {end}", child, end)

    def kill(self) -> None:
        """Ends all at once."""
        self._timer.cancel()
        for child in self.children:
            child.kill()

    def _release(self) -> None:
        if self._meeting is not None:
            self._meeting.close()

    def remove_sockets(self) -> None:
        """Removes what shards that were killed left behind."""
        for address in self.addresses:
            with contextlib.suppress(OSError):
                os.unlink(address.removeprefix("unix:"))

    def _check_start(self) -> None:
        """Looks for what hangs, again and again: once they serve, the router's heartbeats tell."""
        now = time.monotonic()
        suspended = next((child for child in self.children if child.suspended), None)
        if suspended is None:
            self._suspended_since = None
        elif self._suspended_since is None:
            self._suspended_since = now
        elif now - self._suspended_since >= self._hang_limit:
            self.blame(f"{suspended.name} has been suspended for {self._hang_limit:g} s")
        if now - self._started >= self._start_limit:
            limit = f"{self._start_limit:.0f} s"
            self.blame(f"the shards were not ready within {limit} (see --startup-timeout)")
        self._timer = asyncio.get_running_loop().call_later(_CHECK_SECONDS, self._check_start)

    async def _watch(self, child: Child) -> None:
        end = await child.wait()
        if not child.asked_to_stop:
            self._ends.append((child, end))
        self._judged.set()


def _blame_rank(culprit: tuple[Child, Exit]) -> int:
    """A shard that explains itself, then one that was killed, then those that failed after it."""
    code = culprit[1].code
    return 0 if code == CONFIGURATION_ERROR else 1 if code < 0 else 2
