"""Several answers to one prompt through the OpenAI routes: n, best_of, and a router's death."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headgate.proto import router_pb2 as pb
from tests.unit import fake_router as fake
from tests.unit.running_gateway import RunningGateway, until

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
TEXTS = [" Tokyo is big", " Tokyo is", " Tokyo"]  # the fake router's answers 0, 1, 2


async def test_choices_of_a_chat() -> None:
    async with RunningGateway() as running:
        response = await running.http.post("/v1/chat/completions", json={**CHAT, "n": 3})
        body = response.json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert [choice["message"]["content"] for choice in body["choices"]] == TEXTS
        assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
        assert response.headers["x-prompt-tokens"] == "3"
        assert running.router.requests[0].parameters.n == 3
        assert len(running.router.requests) == 1


async def test_choices_of_several_prompts_are_in_their_order() -> None:
    async with RunningGateway() as running:
        body = {"prompt": ["a", "b"], "n": 2, "echo": True}
        response = await running.http.post("/v1/completions", json=body)
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        assert [choice["text"] for choice in choices] == [
            prompt + text for prompt in "ab" for text in TEXTS[:2]
        ]
        usage = response.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 10)


async def test_every_choice_shows_the_prompts_logprobs() -> None:
    async with RunningGateway() as running:
        body = {"prompt": "Hi there", "n": 2, "echo": True, "logprobs": 0}
        choices = (await running.http.post("/v1/completions", json=body)).json()["choices"]
        for choice in choices:
            assert choice["logprobs"]["tokens"][:2] == ["Hi", " there"]
            assert choice["logprobs"]["token_logprobs"][:2] == [None, -3.25]


async def test_a_prompt_is_scored_without_an_answer() -> None:
    async with RunningGateway() as running:
        body = {"prompt": "Hi there", "echo": True, "max_tokens": 0}
        assert (await running.http.post("/v1/completions", json=body)).status_code == 200
        sent = running.router.requests[0].parameters
        assert sent.HasField("max_new_tokens") and sent.max_new_tokens == 0
        assert sent.prompt_logprobs


async def test_prompt_logprobs_as_vllm_shows_them() -> None:
    async def script(conversation: fake.Conversation, submit: pb.Submit) -> None:
        second = fake.token(2, " there", -3.25)
        second.top.extend([fake.token(7, " you", -0.5), fake.token(2, " there", -3.25)])
        prefill = [pb.Token(id=1, text="Hi"), second]
        conversation.send(submit, fake.accepted(), fake.finished("x", 1, prefill=prefill))

    shown = [
        None,
        {
            "2": {"logprob": -3.25, "rank": 2, "decoded_token": " there"},
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": " you"},
        },
    ]
    async with RunningGateway(script) as running:
        body = {"prompt_logprobs": 2}
        text = await running.http.post("/v1/completions", json={"prompt": "Hi there", **body})
        assert text.json()["choices"][0]["prompt_logprobs"] == shown
        chat = await running.http.post("/v1/chat/completions", json={**CHAT, **body})
        assert chat.json()["prompt_logprobs"] == shown
        sent = running.router.requests[0].parameters
        assert (sent.prompt_logprobs, sent.prompt_top_n_tokens) == (True, 2)
        body |= {"prompt": "Hi", "stream": True}
        refused = await running.http.post("/v1/completions", json=body)
        assert refused.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_streamed_choices_are_interleaved(path: str) -> None:
    async with RunningGateway() as running:
        own: dict[str, Any] = CHAT if "chat" in path else {"prompt": ["a", "b"]}
        body = {**own, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
        events = await running.stream(path, body)
        assert events.pop() == "[DONE]"
        usage = events.pop()["usage"]
        prompts = 1 if "chat" in path else 2
        assert usage["prompt_tokens"] == 3 * prompts
        assert usage["completion_tokens"] == 5 * prompts
        texts = [""] * (2 * prompts)
        ends = [0] * len(texts)
        for event in events:
            (choice,) = event["choices"]
            assert not ends[choice["index"]]
            part = choice["delta"]["content"] if "chat" in path else choice["text"]
            texts[choice["index"]] += part
            ends[choice["index"]] += choice["finish_reason"] is not None
        assert texts == TEXTS[:2] * prompts
        assert all(ends)
        assert [event["choices"][0]["index"] for event in events[:2]] != [0, 0]


async def test_best_of_beyond_n_is_the_routers_to_rank() -> None:
    async with RunningGateway() as running:
        for best_of, sent in ((2, 2), (1, None)):
            body = {"prompt": "a", "best_of": best_of}
            assert (await running.http.post("/v1/completions", json=body)).status_code == 200
            parameters = running.router.requests[-1].parameters
            assert (parameters.best_of if parameters.HasField("best_of") else None) == sent
            assert parameters.n in (0, 1)


async def test_beams_are_the_routers_to_find() -> None:
    async with RunningGateway() as running:
        for path, own in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "a"})):
            body = {**own, "use_beam_search": True, "n": 2, "best_of": 4, "max_tokens": 8}
            body |= {"length_penalty": 0.5, "early_stopping": "never", "temperature": 0, "seed": 3}
            response = await running.http.post(path, json=body)
            assert len(response.json()["choices"]) == 2
            sent = running.router.requests[-1].parameters
            assert (sent.beam_width, sent.n, sent.length_penalty) == (4, 2, 0.5)
            assert sent.early_stopping == pb.EARLY_STOPPING_NEVER
            assert not sent.do_sample
            for name in ("temperature", "seed", "best_of"):
                assert not sent.HasField(name)


@pytest.mark.parametrize("fields", [{"n": 3}, {"n": 2, "best_of": 3}])
async def test_too_many_beams_are_told_by_the_field_that_asked_for_them(
    fields: dict[str, int],
) -> None:
    async def refuse(conversation: fake.Conversation, submit: pb.Submit) -> None:
        text = "`beam_width` must be <= 2, the rows of a step. Given: 3"
        conversation.send(submit, fake.error("validation", 422, text, field="beam_width"))

    async with RunningGateway(refuse) as running:
        for path, own in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "a"})):
            body = {**own, "use_beam_search": True, **fields}
            error = (await running.http.post(path, json=body)).json()["error"]
            assert error["param"] == list(fields)[-1]
            assert f"`{error['param']}` must be <= 2" in error["message"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_beam_search": True, "stream": True}, "use_beam_search"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "early_stopping": "soon"}, "early_stopping"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
    ],
)
async def test_refusals_of_beams(fields: dict[str, Any], named: str) -> None:
    async with RunningGateway() as running:
        response = await running.http.post("/v1/completions", json={"prompt": "a", **fields})
        assert response.status_code == 422
        assert response.json()["error"]["param"] == named


async def test_answers_go_on_at_a_new_router_and_ended_ones_are_not_made_again() -> None:
    started = asyncio.Event()

    async def half(conversation: fake.Conversation, submit: pb.Submit) -> None:
        word = fake.WORDS[0]
        token = fake.token(11, word)
        conversation.send(
            submit,
            fake.accepted(seed=9, num_answers=3),
            *(fake.tokens(0, token, text=word, offset=0, index=index) for index in (0, 1, 2)),
            fake.finished(word, 1, index=2),
        )
        started.set()

    async with RunningGateway(half) as running:
        body = {**CHAT, "n": 3}
        whole = asyncio.create_task(running.http.post("/v1/chat/completions", json=body))
        await started.wait()
        await until(lambda: running.router.submits)
        await asyncio.sleep(0.05)
        await running.router.die()
        async with running.restart_router() as router:
            choices = (await whole).json()["choices"]
            assert [choice["message"]["content"] for choice in choices] == TEXTS
            (submit,) = router.submits
            assert submit.delivered.seed == 9
            answers = submit.delivered.answers
            assert [answer.index for answer in answers] == [0, 1, 2]
            assert [answer.finished for answer in answers] == [False, False, True]
            assert [answer.text_offset for answer in answers] == [6, 6, 6]


async def test_ranked_answers_are_not_streamed() -> None:
    async with RunningGateway() as running:
        for n, best_of, status in ((1, 2, 422), (2, 2, 200)):
            body = {"prompt": "a", "n": n, "best_of": best_of, "stream": True}
            response = await running.http.post("/v1/completions", json=body)
            assert response.status_code == status
            if status == 422:
                assert response.json()["error"]["param"] == "best_of"
