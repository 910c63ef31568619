"""Whether a request could run at all, were it alone."""

from __future__ import annotations

from headgate.router.kv_cache_manager import KVCacheManager
from headgate.router.request import Request
from headgate.router.scheduler_config import RequestTooLarge, SchedulerConfig


class RequestSize:
    """What there is at most of rows and KV blocks, and what a request takes of them."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager) -> None:
        self._config = config
        self._kv = kv

    @property
    def max_rows(self) -> int:
        """Rows that may run at once."""
        budget = self._config.max_batch_prefill_tokens
        return min(self._config.max_batch_size or budget, budget)

    def fits(self, request: Request) -> bool:
        """Whether there are KV blocks enough for it to run to its end, with all of its beams."""
        return self._blocks(request) * _width(request) <= self._kv.pool.num_blocks

    def check(self, request: Request) -> None:
        """Raises RequestTooLarge."""
        prompt, new = len(request.prompt_ids), request.sampling.max_new_tokens
        limit = self._config.max_total_tokens
        if limit and prompt + new > limit:
            raise RequestTooLarge(
                f"{prompt} prompt tokens and {new} new tokens exceed max_total_tokens ({limit})"
            )
        width, max_rows = _width(request), self.max_rows
        if width > max_rows:
            raise RequestTooLarge(
                f"`beam_width` must be <= {max_rows}, the rows of a step. Given: {width}",
                field="beam_width",
            )
        if self.fits(request):
            return
        each, there = self._blocks(request), self._kv.pool.num_blocks
        blocks = f"KV blocks of {self._config.block_size} tokens"
        if each > there:
            raise RequestTooLarge(
                f"{prompt} prompt tokens and {new} new tokens need {each} {blocks};"
                f" there are {there}"
            )
        raise RequestTooLarge(
            f"`beam_width` must be <= {there // each}: each beam of {prompt} prompt tokens and"
            f" {new} new tokens needs {each} {blocks}, and there are {there}. Given: {width}",
            field="beam_width",
        )

    def _blocks(self, request: Request) -> int:
        """Of one beam, or of a request without."""
        return self._kv.blocks_for(request.max_positions)


def _width(request: Request) -> int:
    """Rows that it runs in, all at once."""
    return 1 if request.beams is None else request.beams.width
