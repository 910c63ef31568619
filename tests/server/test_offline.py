"""`LLM` and `headgate batch`: the engine without a server, and nothing of it left afterwards."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from headgate import LLM, BeamSearchParams, RequestOutput, SamplingParams
from headgate.private_server import ServerError
from tests.checkpoints import IM_END, IM_START
from tests.server.live_server import ROOT

SMALL = "--threads-per-shard=1"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["abc", "Once upon a time", "x", "The quick brown fox"]


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    before = set(psutil.Process().children(recursive=True))
    with LLM(str(tiny_checkpoint), max_num_seqs=3, flags=[SMALL]) as llm:
        family = set(psutil.Process().children(recursive=True)) - before
        assert len(family) >= 3  # launcher, router, shard
        yield llm
    _, alive = psutil.wait_procs(family, timeout=1)
    assert not alive
    assert not Path(llm._server.status_path).parent.exists()
    with pytest.raises(ServerError, match="closed"):
        llm.generate("abc")


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_results_in_order_whatever_the_order(llm: LLM) -> None:
    many = PROMPTS * 4  # more than are in flight
    outputs = llm.generate(many, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == many
    backwards = llm.generate(many[::-1], GREEDY, use_tqdm=False)
    assert ids(backwards)[::-1] == ids(outputs)
    assert [llm.generate(prompt, GREEDY)[0].outputs for prompt in PROMPTS] == [
        output.outputs for output in outputs[:4]
    ]
    as_ids = [{"prompt_token_ids": list(prompt.encode())} for prompt in PROMPTS]
    assert ids(llm.generate(as_ids, GREEDY)) == ids(outputs[:4])
    assert outputs[0].prompt_token_ids == list(b"abc") and outputs[0].finished


def test_parameters(llm: LLM) -> None:
    (plain,) = llm.generate("abc", GREEDY)
    tokens = plain.outputs[0].token_ids
    stopping = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[tokens[3]], logprobs=2)
    seeded = SamplingParams(temperature=0.9, seed=5, max_tokens=12, ignore_eos=True)
    long = SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True)
    end = list(b"abc") * 169
    outputs = llm.generate(["abc", "abc", "abc", end], [stopping, seeded, seeded, long])
    stopped = outputs[0].outputs[0]
    assert stopped.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", tokens[3])
    assert stopped.logprobs is not None and stopped.cumulative_logprob is not None
    assert all(2 <= len(place) <= 3 for place in stopped.logprobs)
    assert ids(outputs)[1] == ids(outputs)[2]
    assert len(ids(outputs)[3]) == 512 - len(end)  # the context's end, not an error
    free = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    first, second = ids(llm.generate(["abc", "abc"], free))
    assert first != second  # each has a seed of its own
    several = SamplingParams(temperature=0.9, seed=5, max_tokens=12, ignore_eos=True, n=5)
    (answers,) = llm.generate("abc", several)
    assert [answer.index for answer in answers.outputs] == list(range(5))
    assert len({tuple(answer.token_ids) for answer in answers.outputs}) == 5
    assert answers.outputs[0].token_ids == ids(outputs)[1]
    best = SamplingParams(temperature=0.9, seed=5, max_tokens=12, best_of=5, logprobs=0)
    (chosen,) = llm.generate("abc", best)
    assert len(chosen.outputs) == 1
    search = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    (beams,) = llm.beam_search("abc", search)
    assert len(beams.sequences) == 3
    for beam in beams.sequences:
        assert beam.tokens[:3] == list(b"abc") and len(beam.tokens) == 9
        assert beam.text.startswith("abc") and len(beam.logprobs) == 6
    sums = [beam.cum_logprob for beam in beams.sequences]
    assert sums == sorted(sums, reverse=True)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    (output,) = llm.generate("abc", asked)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert list(b"bc") == [next(iter(place)) for place in output.prompt_logprobs[1:] if place]


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hi"}]
    one = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert one[0].prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert one[0].prompt_token_ids[0] == IM_START and IM_END in one[0].prompt_token_ids
    assert ids(llm.chat([conversation, conversation], GREEDY)) == ids(one) * 2
    assert ids(llm.generate(one[0].prompt, GREEDY)) == ids(one)
    (own,) = llm.chat(conversation, GREEDY, chat_template="{{ messages[0]['content'] }}!")
    assert own.prompt == "Hi!"
    with pytest.raises(ValueError, match="conversation 0"):
        llm.chat([{"role": "user"}], GREEDY)
    tool = {"type": "function", "function": {"name": "get_weather"}}
    (shown,) = llm.chat(conversation, GREEDY, tools=[tool])
    assert shown.prompt.startswith("<|im_start|>system\n") and "get_weather" in shown.prompt


def test_encode(llm: LLM) -> None:
    one, two = llm.encode(["The capital", {"prompt_token_ids": [5, 6, 7]}], use_tqdm=False)
    assert math.hypot(*one.outputs.data) == pytest.approx(1, abs=1e-6)
    assert two.prompt_token_ids == [5, 6, 7] and len(two.outputs.data) == len(one.outputs.data)
    (last,) = llm.embed([[5, 6, 7]], pooling="last", normalize=False, use_tqdm=False)
    assert last.outputs.embedding != two.outputs.embedding
    with pytest.raises(ValueError, match="pooling"):
        llm.encode("x", pooling="max")


def test_refusals_name_the_prompt(llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompt 2 has 600 tokens"):
        llm.generate(["a", "b", "c" * 600], GREEDY)
    with pytest.raises(ValueError, match=r"prompt 1: .*vocabulary"):
        llm.generate([[1], [10_000]], GREEDY)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        llm.generate("", GREEDY)
    with pytest.raises(ValueError, match="top_n_tokens"):
        llm.generate("a", SamplingParams(logprobs=21))
    with pytest.raises(ValueError, match="lora_request"):
        llm.generate("a", lora_request=object())
    assert len(llm.generate(PROMPTS, GREEDY)) == len(PROMPTS)


def test_a_router_that_dies_is_no_matter(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    expected = ids(llm.generate(PROMPTS, long))
    router = next(
        process
        for process in psutil.Process().children(recursive=True)
        if "headgate.router" in process.cmdline()
    )
    killed = []

    class KillAtFirst:
        """A progress bar that kills the router once."""

        def __init__(self, **_: Any) -> None: ...

        def update(self, n: int) -> None:
            if not killed:
                router.kill()
                killed.append(n)

        def close(self) -> None: ...

    assert ids(llm.generate(PROMPTS * 3, long, use_tqdm=KillAtFirst)) == expected * 3
    assert killed


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"--model-id .*/nowhere does not exist\.$"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(ServerError, match=r"quantize.* awq is not available"):
        LLM(quantization="awq")
    with pytest.raises(ServerError, match="--wings"):
        LLM(flags=["--wings=2"])


def run(arguments: list[str], home: Path) -> subprocess.Popen[str]:
    """A Python process whose server's files are made in `home`."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(home), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_nothing_left(home: Path) -> None:
    """No process of the program's server, and none of its files."""
    deadline = time.monotonic() + 15
    while left := [*processes_of(home), *home.iterdir()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def processes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(home):
                found.append(process)
    return found


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("h")  # short: sockets are made in it


def test_the_program_of_the_docs(tiny_checkpoint: Path, home: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "offline.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    program = tmp_path / "program.py"
    program.write_text(re.sub(r'model=".*?"', f"model={str(tiny_checkpoint)!r}", code))
    process = run([str(program)], home)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert output.count("Prompt: 'The ") == 3 and output.count("Generated text: ") == 4
    wait_nothing_left(home)


def test_a_batch_goes_on_after_a_kill(
    llm: LLM, tiny_checkpoint: Path, home: Path, tmp_path: Path
) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = []
    for index in range(24):
        common = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
        if index % 2:
            prompt = f"prompt {index}"
            bodies.append(("/v1/completions", {"prompt": prompt, **common}))
        else:
            message = {"role": "user", "content": f"message {index}"}
            bodies.append(("/v1/chat/completions", {"messages": [message], **common}))
    bodies[5] = ("/v1/completions", {"prompt": "x", "temperature": -1})
    lines = [
        json.dumps({"custom_id": f"id {index}", "method": "POST", "url": url, "body": body})
        for index, (url, body) in enumerate(bodies)
    ]
    lines.insert(1, "this is no request")
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join(lines))
    command = [
        *("-m", "headgate.launcher", "batch", "--input", str(requests), "--output", str(results)),
        *("--model-id", str(tiny_checkpoint), "--max-concurrent-requests=2", SMALL),
    ]
    process = run(command, home)
    deadline = time.monotonic() + 60
    while not results.exists() or results.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    wait_nothing_left(home)
    before = results.read_text()
    assert 4 <= before.count("\n") < len(lines)
    with results.open("a") as stream:
        stream.write('{"id": "batch_req_1", "custom_id": "id 3')

    process = run(command, home)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "25 results" in output and "2 failed" in output
    wait_nothing_left(home)
    assert results.read_text().startswith(before[: before.rindex("\n") + 1])
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    bad = entries.pop(1)
    assert (bad["custom_id"], bad["response"], bad["error"]["line"]) == (None, None, 2)
    assert [entry["custom_id"] for entry in entries] == [f"id {i}" for i in range(24)]
    assert len({entry["id"] for entry in entries}) == 24
    refused = entries[5]["response"]
    assert refused["status_code"] == 422 and refused["body"]["error"]["param"] == "temperature"
    wanted = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    (text,) = llm.generate("prompt 7", wanted)
    (chat,) = llm.chat([{"role": "user", "content": "message 22"}], wanted)
    choices = [entries[i]["response"]["body"]["choices"][0] for i in (7, 22)]
    assert choices[0]["text"] == text.outputs[0].text
    assert choices[1]["message"]["content"] == chat.outputs[0].text
