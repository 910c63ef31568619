"""The exposition as Prometheus reads it, and the table against docs/metrics.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headgate.router.metrics import DURATIONS, METRICS, Metrics, RequestTimes, StepTimes

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(max_input_tokens=1000, max_total_tokens=2000)


def samples(metrics: Metrics) -> dict[str, float]:
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in metrics.render().decode().splitlines()
        if not line.startswith("#")
    }


def test_counters_have_their_names_and_nothing_appended(metrics: Metrics) -> None:
    metrics.received()
    metrics.failed("overloaded")
    text = metrics.render().decode()
    assert "# TYPE tgi_request_count counter\ntgi_request_count 1\n" in text
    assert 'tgi_request_failure{err="overloaded"} 1\n' in text
    assert "_total " not in text


def test_prometheus_can_parse_all(metrics: Metrics) -> None:
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    assert set(families) == {metric.name for metric in METRICS}
    for metric in METRICS:
        assert families[metric.name].type == metric.kind
        assert families[metric.name].samples, metric.name


def test_every_sample_exists_before_anything_happened(metrics: Metrics) -> None:
    seen = samples(metrics)
    assert seen['tgi_batch_inference_count{method="prefill"}'] == 0
    assert seen['tgi_batch_forward_duration_count{method="decode"}'] == 0
    assert seen['tgi_request_skipped_tokens{quantile="0.5"}'] == 0


def test_buckets_are_tgi_s(metrics: Metrics) -> None:
    assert len(DURATIONS) == 35
    assert DURATIONS[0] == pytest.approx(0.00015)
    assert DURATIONS[-1] == pytest.approx(145.6, rel=1e-3)
    text = metrics.render().decode()
    lengths = re.findall(r'tgi_request_input_length_bucket{le="([^"]+)"}', text)
    assert (len(lengths), lengths[0], lengths[-2:]) == (101, "10", ["1000", "+Inf"])
    assert text.count("tgi_batch_next_size_bucket") == 1025


def test_histogram_counts_up_to_and_including_its_bound(metrics: Metrics) -> None:
    metrics.accepted(input_tokens=20, max_new_tokens=5)
    metrics.accepted(input_tokens=5000, max_new_tokens=5)
    seen = samples(metrics)
    assert seen['tgi_request_input_length_bucket{le="10"}'] == 0
    assert seen['tgi_request_input_length_bucket{le="20"}'] == 1
    assert seen['tgi_request_input_length_bucket{le="+Inf"}'] == 2
    assert seen["tgi_request_input_length_sum"] == 5020
    assert seen["tgi_prompt_tokens"] == 5020


def test_events(metrics: Metrics) -> None:
    metrics.first_token(0.5)
    metrics.next_tokens(0.1, 1)
    metrics.came_together(0, 1)
    metrics.came_together(3, 2)
    metrics.succeeded(RequestTimes(1.0, 0.1, 0.2, 0.7, 0.35), generated_tokens=2)
    metrics.step_planned("prefill", joined=2, was_running=True, seconds=0.001)
    metrics.step_planned("decode", joined=0, was_running=True, seconds=0.001)
    metrics.step_done("prefill", StepTimes(0.1, 0.09, 0.001, 0.001), draft_tokens=8)
    metrics.step_failed("decode")
    metrics.failed("a new kind")
    seen = samples(metrics)
    assert seen["tgi_generated_tokens"] == 2
    assert seen["tgi_request_skipped_tokens_count"] == 4
    assert seen["tgi_request_skipped_tokens_sum"] == 6
    assert (seen["tgi_draft_tokens"], seen["tgi_accepted_draft_tokens"]) == (8, 6)
    assert seen["tgi_request_time_to_first_token_duration_sum"] == 0.5
    assert seen["tgi_request_success"] == 1
    assert seen['tgi_batch_concat{reason="chunking"}'] == 1
    assert seen['tgi_batch_inference_count{method="decode"}'] == 1
    assert seen['tgi_batch_inference_failure{method="decode"}'] == 1
    assert seen['tgi_batch_inference_duration_sum{method="prefill"}'] == pytest.approx(0.1)
    assert seen['tgi_request_failure{err="other"}'] == 1


def test_docs_tell_every_metric_and_no_other() -> None:
    rows = re.findall(r"^\| `(tgi_\w+)` \| (\w+) \| ([^|]*) \|", DOCS.read_text(), re.MULTILINE)
    told = {name: (kind, labels.strip()) for name, kind, labels in rows}
    assert told.keys() == {metric.name for metric in METRICS}
    for metric in METRICS:
        kind, labels = told[metric.name]
        assert kind == metric.kind, metric.name
        assert re.findall(r"`(\w+)`", labels) == [name for name, _ in metric.labels], metric.name
