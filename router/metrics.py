"""What the router counts and measures: one table of metrics, and what each event does to them.

Names, labels and buckets that TGI has are TGI's. docs/metrics.md explains each; a test
holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from headgate.router.exposition import Family, Histogram, Series, Summary, Value, label_text, render
from headgate.router.scheduler_config import SchedulerStats

METHODS = ("prefill", "decode")
ERRORS = (  # `err` of tgi_request_failure; the first six are TGI's
    "overloaded",
    "validation",
    "template",
    "incomplete",
    "generation",
    "dropped",
    "cancelled",
    "draining",
    "unavailable",
    "other",
)
DURATIONS = tuple(0.0001 * 1.5**k for k in range(1, 36))  # seconds: 0.15 ms to 146 s
BATCH_SIZES = tuple(float(size) for size in range(1, 1025))

_ERROR_OF_TYPE = {
    "overloaded": "overloaded",
    "validation": "validation",
    "template_error": "template",
    "incomplete_generation": "incomplete",
    "incomplete_generation_stream": "incomplete",
    "generation": "generation",
    "dropped": "dropped",
    "slow_client": "dropped",
    "cancelled": "cancelled",
    "draining": "draining",
    "unavailable": "unavailable",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: str  # counter, gauge, histogram, summary
    help: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (label, its values)
    buckets: str = ""  # of a histogram: duration, batch_size, input_tokens or total_tokens


_METHOD = (("method", METHODS),)
_PREFILL_NOTE = "a step with any part of a prompt is a prefill"

METRICS: tuple[Metric, ...] = (
    # ---- requests, TGI's names
    Metric("tgi_request_count", "counter", "Requests received."),
    Metric("tgi_request_success", "counter", "Requests answered in full."),
    Metric(
        "tgi_request_failure",
        "counter",
        "Requests refused, failed or left by their client, by cause.",
        (("err", ERRORS),),
    ),
    Metric(
        "tgi_request_duration",
        "histogram",
        "Seconds from arrival to the last token.",
        buckets="duration",
    ),
    Metric(
        "tgi_request_validation_duration",
        "histogram",
        "Seconds from arrival to the queue: validation and tokenisation.",
        buckets="duration",
    ),
    Metric(
        "tgi_request_queue_duration",
        "histogram",
        "Seconds in the queue, until first scheduled.",
        buckets="duration",
    ),
    Metric(
        "tgi_request_inference_duration",
        "histogram",
        "Seconds from first scheduled to the last token.",
        buckets="duration",
    ),
    Metric(
        "tgi_request_mean_time_per_token_duration",
        "histogram",
        "Inference seconds divided by generated tokens, per request.",
        buckets="duration",
    ),
    Metric(
        "tgi_request_input_length",
        "histogram",
        "Prompt tokens of valid requests, after truncation.",
        buckets="input_tokens",
    ),
    Metric(
        "tgi_request_max_new_tokens",
        "histogram",
        "Tokens that valid requests may generate.",
        buckets="total_tokens",
    ),
    Metric(
        "tgi_request_generated_tokens",
        "histogram",
        "Tokens generated, per finished request.",
        buckets="total_tokens",
    ),
    Metric(
        "tgi_request_skipped_tokens",
        "summary",
        "Tokens that came with another one in the same step of a request: guesses that were right.",
    ),
    # ---- steps, TGI's names
    Metric("tgi_queue_size", "gauge", "Requests waiting to be scheduled, preempted ones included."),
    Metric("tgi_batch_current_size", "gauge", "Requests being computed."),
    Metric(
        "tgi_batch_current_max_tokens",
        "gauge",
        "KV tokens that the running requests are predicted to need at their peak.",
    ),
    Metric("tgi_batch_max_total_tokens", "gauge", "KV tokens that the shards hold."),
    Metric("tgi_batch_total_tokens", "gauge", "KV tokens held by running requests."),
    Metric(
        "tgi_batch_next_size",
        "histogram",
        "Requests that joined the batch in one step.",
        buckets="batch_size",
    ),
    Metric("tgi_batch_inference_count", "counter", f"Steps sent; {_PREFILL_NOTE}.", _METHOD),
    Metric("tgi_batch_inference_success", "counter", "Steps that ran.", _METHOD),
    Metric("tgi_batch_inference_failure", "counter", "Steps refused or lost.", _METHOD),
    Metric(
        "tgi_batch_inference_duration",
        "histogram",
        "Seconds between results while steps follow each other, else from sending to result.",
        _METHOD,
        "duration",
    ),
    Metric(
        "tgi_batch_forward_duration",
        "histogram",
        "Seconds of forward pass and sampling in the shards.",
        _METHOD,
        "duration",
    ),
    Metric(
        "tgi_batch_decode_duration",
        "histogram",
        "Seconds to turn a step's tokens into text, stop texts included.",
        _METHOD,
        "duration",
    ),
    Metric(
        "tgi_batch_filter_duration",
        "histogram",
        "Seconds to take a step's result over and free what has ended.",
        _METHOD,
        "duration",
    ),
    Metric(
        "tgi_batch_concat",
        "counter",
        "Steps in which requests joined a batch that was running.",
        (("reason", ("backpressure", "wait_exceeded", "chunking")),),
    ),
    Metric(
        "tgi_batch_concat_duration",
        "histogram",
        "Seconds to plan a step in which requests joined a running batch.",
        (("method", ("decode",)),),
        "duration",
    ),
    # ---- what TGI does not tell
    Metric(
        "tgi_request_time_to_first_token_duration",
        "histogram",
        "Seconds from arrival to the first token.",
        buckets="duration",
    ),
    Metric(
        "tgi_request_inter_token_latency_duration",
        "histogram",
        "Seconds between two tokens of a request.",
        buckets="duration",
    ),
    Metric("tgi_prompt_tokens", "counter", "Prompt tokens of accepted requests."),
    Metric("tgi_generated_tokens", "counter", "Tokens generated."),
    Metric("tgi_draft_tokens", "counter", "Tokens that were guessed, and computed to check them."),
    Metric(
        "tgi_accepted_draft_tokens", "counter", "Guessed tokens that were right, and delivered."
    ),
    Metric(
        "tgi_request_live",
        "gauge",
        "Answers that count against --max-concurrent-requests; a request may ask for several.",
    ),
    Metric("tgi_request_preemptions", "counter", "Times a request gave its KV memory up."),
    Metric(
        "tgi_request_recoveries", "counter", "Times a running request lost its shards and went on."
    ),
    Metric("tgi_group_recoveries", "counter", "Shard groups that took over from one lost."),
    Metric("tgi_kv_cache_usage_ratio", "gauge", "Share of KV blocks held by running requests."),
    Metric("tgi_kv_cache_used_blocks", "gauge", "KV blocks held by running requests."),
    Metric("tgi_kv_cache_cached_blocks", "gauge", "KV blocks kept as prefix cache only."),
    Metric("tgi_kv_cache_free_blocks", "gauge", "KV blocks that hold nothing."),
    Metric("tgi_prefix_cache_query_tokens", "counter", "Tokens looked up in the prefix cache."),
    Metric("tgi_prefix_cache_hit_tokens", "counter", "Tokens found in the prefix cache."),
)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds spent on one step."""

    inference: float
    forward: float
    decode: float
    filter: float


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Seconds of one request's life."""

    total: float
    validation: float
    queue: float
    inference: float
    per_token: float


@dataclass(frozen=True, slots=True)
class _StepSeries:
    """What every step of a method is counted and timed in, found once."""

    count: Value
    success: Value
    inference: Histogram
    forward: Histogram
    decode: Histogram
    filter: Histogram


class Metrics:
    """The values of the table. Events are recorded by name; `render` writes them all."""

    def __init__(self, max_input_tokens: int, max_total_tokens: int) -> None:
        bounds = {
            "duration": DURATIONS,
            "batch_size": BATCH_SIZES,
            "input_tokens": _linear(max_input_tokens),
            "total_tokens": _linear(max_total_tokens),
        }
        self._families = {metric.name: _family(metric, bounds) for metric in METRICS}
        self._skipped = self._summary("tgi_request_skipped_tokens")
        self._generated = self.value("tgi_generated_tokens")
        self._between_tokens = self.histogram("tgi_request_inter_token_latency_duration")
        self._steps = {method: self._of_steps(method) for method in METHODS}

    def render(self) -> bytes:
        return render(tuple(self._families.values()))

    def value(self, name: str, **labels: str) -> Value:
        """The counter or gauge; its label values must be the table's."""
        series = self._series(name, labels)
        assert isinstance(series, Value)
        return series

    def histogram(self, name: str, **labels: str) -> Histogram:
        series = self._series(name, labels)
        assert isinstance(series, Histogram)
        return series

    def _summary(self, name: str) -> Summary:
        series = self._series(name, {})
        assert isinstance(series, Summary)
        return series

    def _series(self, name: str, labels: dict[str, str]) -> Series:
        key = label_text(list(labels), list(labels.values())) if labels else ""
        return self._families[name].series[key]

    # --------------------------------------------------------------- requests

    def received(self) -> None:
        self.value("tgi_request_count").inc()

    def failed(self, error_type: str) -> None:
        """`error_type`: a RouterError's, or "dropped" for a client that left."""
        err = _ERROR_OF_TYPE.get(error_type, "other")
        self.value("tgi_request_failure", err=err).inc()

    def accepted(self, input_tokens: int, max_new_tokens: int) -> None:
        self.histogram("tgi_request_input_length").observe(input_tokens)
        self.histogram("tgi_request_max_new_tokens").observe(max_new_tokens)
        self.value("tgi_prompt_tokens").inc(input_tokens)

    def first_token(self, seconds: float) -> None:
        self._tokens(1)
        self.histogram("tgi_request_time_to_first_token_duration").observe(seconds)

    def next_tokens(self, seconds: float, times: int) -> None:
        """Tokens of `times` requests, `seconds` after the token before of each."""
        self._generated.inc(times)
        self._between_tokens.observe(seconds, times)

    def came_together(self, others: int, times: int) -> None:
        """`others`: tokens that came with another one, in a step of each of `times` requests."""
        self._skipped.observe(others, times)
        if others:
            self.value("tgi_accepted_draft_tokens").inc(others * times)

    def tokens_at_once(self, count: int) -> None:
        """A whole answer, none of whose tokens came before."""
        self._tokens(count)

    def _tokens(self, times: int) -> None:
        self._generated.inc(times)
        self._skipped.observe(0, times)

    def succeeded(self, times: RequestTimes, generated_tokens: int) -> None:
        self.value("tgi_request_success").inc()
        self.histogram("tgi_request_duration").observe(times.total)
        self.histogram("tgi_request_validation_duration").observe(times.validation)
        self.histogram("tgi_request_queue_duration").observe(times.queue)
        self.histogram("tgi_request_inference_duration").observe(times.inference)
        if generated_tokens:  # an embedding has none
            self.histogram("tgi_request_mean_time_per_token_duration").observe(times.per_token)
        self.histogram("tgi_request_generated_tokens").observe(generated_tokens)

    # ------------------------------------------------------------------ state

    def take_state(
        self, live: int, waiting: int, stats: SchedulerStats | None, block_size: int
    ) -> None:
        """The metrics that the scheduler keeps; `waiting`: requests that have not reached it."""
        self.value("tgi_request_live").set(live)
        self.value("tgi_queue_size").set(waiting + (stats.num_waiting if stats else 0))
        if stats is None:
            return
        for name, amount in {
            "tgi_batch_current_size": stats.num_running,
            "tgi_batch_current_max_tokens": stats.predicted_peak_blocks * block_size,
            "tgi_batch_max_total_tokens": stats.blocks_total * block_size,
            "tgi_batch_total_tokens": stats.blocks_used * block_size,
            "tgi_request_preemptions": stats.preemptions,
            "tgi_request_recoveries": stats.recoveries,
            "tgi_kv_cache_usage_ratio": stats.blocks_used / max(stats.blocks_total, 1),
            "tgi_kv_cache_used_blocks": stats.blocks_used,
            "tgi_kv_cache_cached_blocks": stats.blocks_cached,
            "tgi_kv_cache_free_blocks": stats.blocks_free,
            "tgi_prefix_cache_query_tokens": stats.prefix_queries,
            "tgi_prefix_cache_hit_tokens": stats.prefix_hits,
        }.items():
            self.value(name).set(amount)

    # ------------------------------------------------------------------ steps

    def step_planned(self, method: str, joined: int, was_running: bool, seconds: float) -> None:
        """`joined`: requests new in this step; `seconds`: to plan it."""
        self._steps[method].count.inc()
        if not joined:
            return
        self.histogram("tgi_batch_next_size").observe(joined)
        if was_running:
            self.value("tgi_batch_concat", reason="chunking").inc()
            self.histogram("tgi_batch_concat_duration", method="decode").observe(seconds)

    def step_done(self, method: str, times: StepTimes, draft_tokens: int = 0) -> None:
        """`draft_tokens`: guessed ones that it computed."""
        series = self._steps[method]
        series.success.inc()
        series.inference.observe(times.inference)
        series.forward.observe(times.forward)
        series.decode.observe(times.decode)
        series.filter.observe(times.filter)
        if draft_tokens:
            self.value("tgi_draft_tokens").inc(draft_tokens)

    def _of_steps(self, method: str) -> _StepSeries:
        durations = (
            self.histogram(f"tgi_batch_{name}_duration", method=method)
            for name in ("inference", "forward", "decode", "filter")
        )
        count = self.value("tgi_batch_inference_count", method=method)
        success = self.value("tgi_batch_inference_success", method=method)
        return _StepSeries(count, success, *durations)

    def step_failed(self, method: str) -> None:
        self.value("tgi_batch_inference_failure", method=method).inc()


def _linear(top: int) -> tuple[float, ...]:
    return tuple(top / 100 * k for k in range(1, 101))


def _family(metric: Metric, bounds: dict[str, tuple[float, ...]]) -> Family:
    names = [name for name, _ in metric.labels]
    series: dict[str, Series] = {}
    for values in product(*(values for _, values in metric.labels)):
        made: Series
        if metric.kind == "histogram":
            made = Histogram(bounds[metric.buckets])
        else:
            made = Summary() if metric.kind == "summary" else Value()
        series[label_text(names, values)] = made
    return Family(metric.name, metric.kind, metric.help, series)
