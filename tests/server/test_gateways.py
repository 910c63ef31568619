"""Several gateways in front of one router: one limit, one set of metrics, each replaceable."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.live_server import LiveServer, launched

# What TGI's dashboard plots; each expression needs samples under exactly these names.
DASHBOARD = (
    "tgi_request_count",
    "tgi_request_success",
    "tgi_queue_size",
    "tgi_batch_current_size",
    "tgi_batch_current_max_tokens",
    "tgi_batch_next_size_bucket",
    "tgi_batch_inference_count",
    "tgi_batch_inference_success",
    "tgi_batch_inference_duration_bucket",
    "tgi_batch_forward_duration_bucket",
    "tgi_batch_decode_duration_bucket",
    "tgi_batch_filter_duration_bucket",
    "tgi_batch_concat",
    "tgi_batch_concat_duration_bucket",
    "tgi_request_duration_bucket",
    "tgi_request_validation_duration_bucket",
    "tgi_request_queue_duration_bucket",
    "tgi_request_inference_duration_bucket",
    "tgi_request_mean_time_per_token_duration_bucket",
    "tgi_request_input_length_bucket",
    "tgi_request_generated_tokens_bucket",
    "tgi_request_max_new_tokens_bucket",
)


@pytest.fixture(scope="module")
def two_gateways(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    with launched("--model-id", str(tiny_checkpoint), "--gateway-workers", "2") as live:
        yield live


def test_every_gateway_tells_the_metrics_of_all(two_gateways: LiveServer) -> None:
    def run(index: int) -> None:
        two_gateways.generate(f"request {index}", max_new_tokens=4, ignore_eos_token=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(40)))
    for _ in range(8):  # new connections: whichever gateway takes them
        metrics = two_gateways.metrics()
        assert metrics["tgi_request_count"] == 40
        assert metrics["tgi_request_success"] == 40
        assert metrics["tgi_request_generated_tokens_sum"] == 160
    for name in DASHBOARD:
        assert any(sample.partition("{")[0] == name for sample in metrics), name


def test_a_gateway_that_dies_is_replaced(two_gateways: LiveServer) -> None:
    module = "headgate.router.gateway"
    first, second = two_gateways.processes(module)
    first.kill()
    deadline = time.monotonic() + 20
    while len(now := two_gateways.processes(module)) < 2 or first in now:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert second in now
    answers = 0
    while answers < 10:
        try:
            two_gateways.generate("still there", max_new_tokens=2)
            answers += 1
        except httpx.TransportError:  # a connection that the dead one had taken
            assert time.monotonic() < deadline
