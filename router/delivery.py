"""What steps bring, on its way to the clients: tokens as they come, then the end of each answer."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from headgate.proto import router_pb2
from headgate.router.beam_search import Hypothesis
from headgate.router.errors import GenerationError, InternalError, RouterError
from headgate.router.live_answers import LiveAnswers
from headgate.router.live_requests import LiveAnswer, LiveRequest
from headgate.router.metrics import Metrics
from headgate.router.output_processor import Outcome
from headgate.router.row_output import RowOutput

logger = logging.getLogger(__name__)

_REASON_NAMES = {
    router_pb2.FINISH_REASON_LENGTH: "length",
    router_pb2.FINISH_REASON_EOS_TOKEN: "eos_token",
    router_pb2.FINISH_REASON_STOP_SEQUENCE: "stop_sequence",
    router_pb2.FINISH_REASON_POOLED: "pooled",
}


class Delivery:
    """It decides nothing: ends that only the text shows are the caller's to act upon."""

    def __init__(
        self,
        live: LiveAnswers,
        metrics: Metrics,
        log_prompts: bool,
        stop_row: Callable[[int], None],
        fail: Callable[[LiveRequest, RouterError], None],
    ) -> None:
        """`stop_row(id)`: the row's answer ended though its shards go on; `fail`: ends a request
        with an error event."""
        self._live = live
        self._metrics = metrics
        self._log_prompts = log_prompts
        self._stop_row = stop_row
        self._fail = fail

    def deliver_step(self, outputs: Sequence[RowOutput], arrived: float) -> None:
        """All that a result brought, which arrived then."""
        gaps: Counter[float] = Counter()  # when a request's token before this one came
        others: Counter[int] = Counter()  # tokens that came with another one, by row
        live = self._live
        for output in outputs:
            answer = live.get(output.request.id)
            if answer is None:
                continue
            try:
                self._deliver_output(answer, output, arrived, gaps, others)
            except Exception:
                # One answer's text must not take the other requests with it.
                logger.exception("request %s failed", answer.live.valid.request_id)
                self._fail(answer.live, InternalError())
        for last, times in gaps.items():
            self._metrics.next_tokens(arrived - last, times)
        if gaps:
            alone = gaps.total() - others.total() - len(others)
            self._metrics.came_together(0, alone)
            for count, times in Counter(others.values()).items():
                self._metrics.came_together(count, times)

    def deliver(self, answer: LiveAnswer, outcome: Outcome) -> None:
        """A token, text, or an end."""
        live = answer.live
        if outcome.token_id is not None or outcome.text:
            live.sink.tokens(outcome)
        if outcome.reason and not live.ended:  # a sink that overflowed has ended it
            self._finish(answer, outcome)

    def _deliver_output(
        self,
        answer: LiveAnswer,
        output: RowOutput,
        arrived: float,
        gaps: Counter[float],
        others: Counter[int],
    ) -> None:
        if output.failure:
            self._fail(answer.live, GenerationError(output.failure))
            return
        if output.hypotheses:
            self._deliver_beams(answer.live, output.hypotheses, arrived)
            return
        outcome = answer.text.take(output)
        if outcome is None:
            return
        if outcome.token_id is not None:
            last, answer.last_token = answer.last_token, arrived
            if last is None:
                answer.first_token = arrived
                self._metrics.first_token(arrived - answer.live.valid.arrival)
            else:
                gaps[last] += 1
                if last == arrived:
                    others[output.request.id] += 1
        self.deliver(answer, outcome)

    def _deliver_beams(
        self, live: LiveRequest, hypotheses: Sequence[Hypothesis], arrived: float
    ) -> None:
        """The best answers of a search that is done."""
        if len(hypotheses) < len(live.answers):
            found = f"beam search found {len(hypotheses)} of {len(live.answers)} answers"
            self._fail(live, GenerationError(found))
            return
        for answer, hypothesis in zip(live.answers, hypotheses, strict=False):
            answer.first_token, answer.score = arrived, hypothesis.score
            self._metrics.tokens_at_once(len(hypothesis.token_ids))
            tokens, outcome = answer.text.push_all(hypothesis)
            live.sink.send(router_pb2.GenerateEvent(tokens=tokens))
            if not live.ended:
                self._finish(answer, outcome)

    def _finish(self, answer: LiveAnswer, outcome: Outcome) -> None:
        live, text = answer.live, answer.text
        if outcome.by_text:
            self._stop_row(answer.request.id)
        now = time.monotonic()
        finished = router_pb2.Finished(
            reason=outcome.reason,
            generated_text=text.text,
            generated_tokens=text.num_tokens,
            input_tokens=len(live.valid.prompt_ids),
            cached_tokens=live.num_cached_tokens,
            seed=live.valid.seed,
            prefill=text.prefill_tokens(),
            timings=live.timings(answer, now),
            stop_sequence=text.stop_text,
            index=answer.index,
            embedding=outcome.embedding,
            score=answer.score,
        )
        self._live.close(answer)
        live.sink.send(router_pb2.GenerateEvent(finished=finished))
        if live.ended:
            self._metrics.succeeded(live.times(now), live.num_tokens)
            live.log_end(_REASON_NAMES[outcome.reason], now, self._log_prompts)
