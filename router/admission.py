"""Whether one more request fits into KV memory, over the lives of all that run.

A forecast only: it allocates nothing, and a wrong one costs a preemption, not an answer.

How long an answer will get is unknown, so memory is promised to requests by `kv_overcommit`:

  0        nothing is forecast: each running request has max_new_tokens reserved for it, and no
           request is ever preempted
  0 < x    each answer is taken to be no longer than a share 1 - x of the recent answers that
           were longer than it is already; while fewer than 32 answers are known, as if lengths
           were spread evenly up to 512 tokens more. Never more than its max_new_tokens, and never
           less than one block more, so that what is admitted can run for some steps.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from math import ceil

from headgate.router.kv_cache_manager import KVCacheManager
from headgate.router.request import Request

HISTORY_LENGTH = 1024  # recent answers remembered
HISTORY_NEEDED = 32  # answers known before they are relied on
DEFAULT_OUTPUT_TOKENS = 512  # the longest answer expected while too few are known


class OutputLengths:
    """Lengths of recent answers, in tokens, to foretell how much longer one will get."""

    def __init__(self, kv_overcommit: float) -> None:
        self._share = 1.0 - kv_overcommit
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def record(self, length: int) -> None:
        """An answer ended at this length (not one that was cancelled)."""
        self._recent.append(length)
        insort(self._sorted, length)
        if len(self._recent) > HISTORY_LENGTH:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def remaining(self, generated: int, limit: int) -> int:
        """Tokens still to come after `generated`, of at most `limit` in all."""
        known = self._sorted
        longer = bisect_right(known, generated)
        tail = len(known) - longer
        if tail == 0 or len(known) < HISTORY_NEEDED:
            return ceil(min(limit - generated, DEFAULT_OUTPUT_TOKENS) * self._share)
        quantile = known[longer + max(ceil(tail * self._share), 1) - 1]
        return min(quantile, limit) - generated


class PeakForecast:
    """The most KV positions that rows will take at once, if all advance in step.

    As they do, memory is fullest just before some row ends and gives its blocks back. With rows in
    descending order of remaining tokens r, the rows alive just before row i ends are the first
    i, each grown by r_i: so the peak is the greatest sum(positions of the first i) + i * r_i.
    """

    def __init__(self, rows: Iterable[tuple[int, int]], shared: int, block_size: int) -> None:
        """`rows`: (positions now, remaining) of each; `shared`: positions that are counted in
        more than one of them, beyond the first time."""
        self._rows = sorted((-remaining, positions) for positions, remaining in rows)
        self._longest = sum(positions - negative for negative, positions in self._rows)
        self._shared = shared
        self._block_size = block_size

    def add(self, positions: int, remaining: int, shared: int) -> None:
        insort(self._rows, (-remaining, positions))
        self._longest += positions + remaining
        self._shared += shared

    def remove(self, positions: int, remaining: int, shared: int) -> None:
        """Takes back an `add`."""
        del self._rows[bisect_left(self._rows, (-remaining, positions))]
        self._longest -= positions + remaining
        self._shared -= shared

    @property
    def upper_bound(self) -> float:
        """What `peak` cannot exceed, without a look at each row: all rows at their longest."""
        return self._longest + len(self._rows) * self._block_size / 2

    def peak(self) -> float:
        """KV positions, block ends included.

        A row's last block is half empty on average. Sharing fades as the sharers end; in the usual
        case, one prefix common to all rows, in proportion to those that are left.
        """
        half_block = self._block_size / 2
        fade = self._shared / max(len(self._rows) - 1, 1)
        held = worst = 0.0
        for others, (negative, positions) in enumerate(self._rows):
            held += positions
            worst = max(worst, held + (others + 1) * (half_block - negative) - others * fade)
        return worst


class Admission:
    """Answers, for one KV memory, whether a candidate may join the running requests."""

    def __init__(self, kv: KVCacheManager, kv_overcommit: float) -> None:
        self._kv = kv
        self._reserve = kv_overcommit == 0
        self._lengths = OutputLengths(kv_overcommit)
        self._forecast: PeakForecast | None = None  # of this step's running rows
        self._spare = 0  # blocks that running rows neither hold nor may come to need

    def record(self, request: Request) -> None:
        """An answer ended by itself."""
        self._lengths.record(len(request.output_ids))

    def open(self, running: Sequence[Request]) -> None:
        """Looks at the running rows, before a step's first candidate."""
        if self._reserve:
            self._spare = self._kv.pool.num_available - sum(self._growth(row) for row in running)
            return
        shared = sum(len(row.block_ids) for row in running) - self._kv.pool.num_used
        self._forecast = PeakForecast(
            [(self._positions(row), self._remaining(row)) for row in running],
            shared * self._kv.block_size,
            self._kv.block_size,
        )
        for row in running:
            self._add_beams(row)

    def fits(self, candidate: Request, hits: Sequence[int], alone: bool) -> bool:
        """Whether `candidate`, with these blocks from the prefix cache, may run with the others.

        If so, it counts as running for the candidates after it. One that would run `alone` always
        may, whatever the forecast says: its full length is known to fit.
        """
        in_use = self._kv.num_in_use(hits)
        if self._reserve:
            growth = self._kv.blocks_for(candidate.max_positions) * candidate.num_rows - in_use
            if growth > self._spare:
                return False
            self._spare -= growth
            return True
        assert self._forecast is not None, "open() comes first"
        row = candidate.num_tokens, self._remaining(candidate), in_use * self._kv.block_size
        self._forecast.add(*row)
        self._add_beams(candidate)
        capacity = self._kv.pool.num_blocks * self._kv.block_size
        forecast = self._forecast
        if not alone and forecast.upper_bound > capacity and forecast.peak() > capacity:
            self._forecast.remove(*row)
            for beam in self._beams(candidate):
                self._forecast.remove(*beam)
            return False
        return True

    def _add_beams(self, row: Request) -> None:
        assert self._forecast is not None
        for beam in self._beams(row):
            self._forecast.add(*beam)

    def _beams(self, row: Request) -> list[tuple[int, int, int]]:
        """The beams to come of a row that stands for several: they share what it has."""
        positions = self._positions(row) if row.is_running else row.num_tokens
        return [(positions, self._remaining(row), positions)] * (row.num_rows - 1)

    def peak_blocks(self, running: Sequence[Request]) -> int:
        """The forecast for the running rows alone, in blocks."""
        self.open(running)
        if self._reserve:
            return self._kv.pool.num_blocks - self._spare
        assert self._forecast is not None
        return self._kv.blocks_for(ceil(self._forecast.peak()))

    def _growth(self, row: Request) -> int:
        return self._kv.blocks_for(row.max_positions) * row.num_rows - len(row.block_ids)

    def _positions(self, row: Request) -> int:
        """What its table holds once its prompt is computed: that comes in the next few steps."""
        return max(row.num_scheduled, row.num_prefill_tokens)

    def _remaining(self, row: Request) -> int:
        generated, limit = len(row.output_ids), row.sampling.max_new_tokens
        expected = self._lengths.remaining(generated, limit)
        return max(expected, min(limit - generated, self._kv.block_size))
