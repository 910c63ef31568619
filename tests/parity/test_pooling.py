"""Pooled prompts: Transformers' hidden states, whatever else runs and however they are cut."""

from __future__ import annotations

from pathlib import Path

import torch

from headgate.proto.messages import Pooling, RowSampling
from tests.checkpoints import make_checkpoint
from tests.parity.serving import Job, Server
from tests.parity.test_exactness import GREEDY, random_prompt

LENGTHS = (1, 16, 37, 90)


def jobs(pooling: Pooling) -> list[Job]:
    sampling = RowSampling(max_new_tokens=1, pooling=pooling)
    return [Job(random_prompt(length, length), sampling) for length in LENGTHS]


def reference(path: Path, pooling: Pooling) -> list[torch.Tensor]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path, dtype=torch.bfloat16).float()  # as they are stored
    vectors = []
    for job in jobs(pooling):
        states = model(torch.tensor([job.prompt_ids])).last_hidden_state[0]
        vectors.append(states.mean(0) if pooling is Pooling.MEAN else states[-1])
    return vectors


def test_pooled_prompts(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    server = Server(path)
    company = [Job(random_prompt(5, 21), GREEDY)]
    for pooling in (Pooling.MEAN, Pooling.LAST):
        with torch.inference_mode():
            wanted = reference(path, pooling)
        server.limits()
        alone = [server.serve([job])[0].pooled for job in jobs(pooling)]
        for vector, expected in zip(alone, wanted, strict=True):
            found = torch.tensor(vector)
            scale = expected.norm()
            torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-3)
        server.limits(step_tokens=8)  # chunks, some of them beside a row that generates
        together = server.serve(company + jobs(pooling))[1:]
        cached = server.serve(company + jobs(pooling))[1:]
        for vector, chunked, again in zip(alone, together, cached, strict=True):
            one = torch.tensor(vector, dtype=torch.float32)
            assert torch.equal(one, torch.tensor(chunked.pooled, dtype=torch.float32))
            assert torch.equal(one, torch.tensor(again.pooled, dtype=torch.float32))
