"""Requests made up from the server's own description: no 500, no hang, nothing undescribed.

`make test` runs it for some seconds with fixed seeds; `make test-api` for a quarter of an hour with
fresh ones, and asks that a third of the calls be served.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.live_server import LiveServer

SECONDS = float(os.environ.get("TEST_API_SECONDS", "8"))
LONG = "TEST_API_SECONDS" in os.environ
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
LEAST_CALLS = 20  # however slow the machine is
CALL_TIMEOUT = 30  # seconds; what takes longer hangs
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
ROUND = ((POSITIVE, 6), (NEGATIVE, 2))  # requests of an operation in a round
load_all_checks()


def explore(operation: Any, mode: GenerationMode, number: int, start: int) -> Counter[int]:
    """Statuses of `number` requests; raises for an answer that is not as described."""
    statuses: Counter[int] = Counter()

    @seed(start)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        response = case.call(timeout=CALL_TIMEOUT)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    call()
    return statuses


@pytest.mark.timeout(SECONDS + 120)
def test_requests_made_up_from_the_description(small: LiveServer) -> None:
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    begun = time.monotonic()
    number = random.randrange(2**32) if LONG else 1
    print(f"first seed: {number}")
    statuses: Counter[int] = Counter()
    by_operation: dict[str, Counter[int]] = {}

    def over() -> bool:
        return time.monotonic() > begun + SECONDS and sum(statuses.values()) > LEAST_CALLS

    while not over():
        for operation in operations:
            for mode, count in ROUND:
                if mode is NEGATIVE and operation.method == "get":
                    continue
                found = explore(operation, mode, count, number)
                by_operation.setdefault(operation.label, Counter()).update(found)
                statuses += found
                number += 1
            if over():
                break
    for label, found in by_operation.items():
        print(f"{label:32} {dict(sorted(found.items()))}")
    total, served = sum(statuses.values()), statuses[200]
    print(f"{total} calls in {time.monotonic() - begun:.0f} s, {served / total:.0%} served")
    assert served >= total / 3 or total < 200
