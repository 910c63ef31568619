"""/v1/embeddings: inputs, encodings, many at a time, refusals; vectors of length 1."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from headgate.proto.messages import Pooling
from headgate.router.pooling import normalised, pooling_of
from tests.unit import fake_router as fake
from tests.unit.fake_router import pb
from tests.unit.running_gateway import RunningGateway

VECTOR = [0.5, -0.25, 0.0009765625]


async def embed(conversation: fake.Conversation, submit: pb.Submit) -> None:
    """The vector, with the input's length before it."""
    size = len(submit.request.text) or len(submit.request.token_ids.ids)
    finished = pb.Finished(reason=pb.FINISH_REASON_POOLED, input_tokens=2)
    finished.embedding.extend([size, *VECTOR])
    conversation.send(submit, fake.accepted(2), pb.GenerateEvent(finished=finished))


async def test_one_input() -> None:
    async with RunningGateway(embed) as running:
        response = await running.http.post("/v1/embeddings", json={"input": "Hi"})
        assert response.status_code == 200
        assert response.json() == {
            "object": "list",
            "model": "model",
            "data": [
                {"object": "embedding", "index": 0, "embedding": [2, 0.5, -0.25, 0.0009765625]}
            ],
            "usage": {"prompt_tokens": 2, "total_tokens": 2},
        }
        assert response.headers["x-prompt-tokens"] == "2"
        (request,) = running.router.requests
        assert request.HasField("embedding") and request.parameters == pb.Parameters()


async def test_base64() -> None:
    async with RunningGateway(embed) as running:
        body = {"input": [5, 6, 7], "encoding_format": "base64", "truncate_prompt_tokens": -1}
        response = await running.http.post("/v1/embeddings", json=body)
        (entry,) = response.json()["data"]
        numbers = struct.unpack("<4f", base64.b64decode(entry["embedding"]))
        assert numbers == pytest.approx([3, *VECTOR], rel=1e-7)
        assert running.router.requests[0].parameters.truncate == 100


async def test_many_inputs_come_in_order_and_a_bounded_number_at_a_time() -> None:
    waiting = most = 0

    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await embed(conversation, submit)
        waiting -= 1

    inputs = ["x" * (1 + number % 50) for number in range(200)]
    async with RunningGateway(script) as running:
        response = await running.http.post("/v1/embeddings", json={"input": inputs})
        data = response.json()["data"]
        assert [entry["index"] for entry in data] == list(range(200))
        assert [entry["embedding"][0] for entry in data] == list(map(len, inputs))
        assert len({request.request_id for request in running.router.requests}) == 200
        assert most <= 32


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", 3]}, "input[1]"),
    ({"input": ["a"] * 2049}, "input"),
    ({"dimensions": 3}, "dimensions"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 2**40}, "truncate_prompt_tokens"),
]


async def test_refusals() -> None:
    async def refuse(conversation: fake.Conversation, submit: pb.Submit) -> None:
        conversation.send(submit, fake.error("validation", 422, "too long", field="inputs"))

    async with RunningGateway(refuse) as running:
        for change, field in [*REFUSED, ({"input": "x"}, "input")]:
            response = await running.http.post("/v1/embeddings", json={"input": "Hi", **change})
            assert response.status_code == 422, change
            assert response.json()["error"]["param"] == field, change


def test_which_pooling(tmp_path: Path) -> None:
    assert pooling_of("auto", tmp_path) is Pooling.MEAN
    assert pooling_of("last", tmp_path) is Pooling.LAST
    layer = tmp_path / "1_Pooling" / "config.json"
    layer.parent.mkdir()
    for text, pooling in (
        (json.dumps({"pooling_mode_lasttoken": True}), Pooling.LAST),
        (json.dumps({"pooling_mode_mean_tokens": True}), Pooling.MEAN),
        ("[]", Pooling.MEAN),
        ("{", Pooling.MEAN),
    ):
        layer.write_text(text)
        assert pooling_of("auto", tmp_path) is pooling
    assert pooling_of("mean", tmp_path) is Pooling.MEAN


def test_length_1() -> None:
    assert normalised([3.0, 4.0]) == [0.6, 0.8]
    assert normalised([0.0, 0.0]) == [0.0, 0.0]
