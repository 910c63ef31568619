"""Every architecture and RoPE, by both CPU back ends on 1, 2 and 3 ranks, against Transformers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.parity.cases import CASES, KERNELS, QUANTISED, Case

REPOSITORY = Path(__file__).parents[2]
Results = dict[tuple[str, str], torch.Tensor | str]  # by kernels and case
TOLERANCE = 1e-4  # of logits whose standard deviation is about 2


def reference(case: Case, path: Path) -> dict[str, torch.Tensor]:
    """Ids and logits of a random prompt and some greedy tokens, computed by Transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB_SIZE, (1, case.prompt_length), generator=generator)
    output = model(ids, use_cache=True)
    logits = [output.logits[0]]
    for _ in range(case.decode_steps):
        token = logits[-1][-1:].argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    return {"ids": ids[0], "logits": torch.cat(logits)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parity")
    with torch.inference_mode():
        for case in CASES:
            path = make_checkpoint(
                directory / case.name, case.architecture, dtype=case.dtype, **case.overrides
            )
            torch.save(reference(case, path), directory / f"{case.name}.pt")
    return directory


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda ranks: f"{ranks}-ranks")
def results(request: pytest.FixtureRequest, checkpoints: Path) -> Results:
    """All cases by one group of processes."""
    world_size: int = request.param
    output = checkpoints / f"results-{world_size}.pt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.parity.rank", str(checkpoints), str(output)]
    ranks = [
        subprocess.Popen(command, cwd=REPOSITORY, env={**environment, "RANK": str(rank)})
        for rank in range(world_size)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(output)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_equal_transformers(
    kernels: str, case: Case, checkpoints: Path, results: Results
) -> None:
    expected = torch.load(checkpoints / f"{case.name}.pt")["logits"]
    logits = results[kernels, case.name]
    assert isinstance(logits, torch.Tensor), logits
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "kind"), QUANTISED, ids=" ".join)
def test_quantised_logits_equal_the_reference_of_the_same_quantisation(
    name: str, kind: str, checkpoints: Path, results: Results
) -> None:
    """Nearly all inputs are quantised to the same values by both back ends; a value in the middle
    between two may go either way, and through its token's keys reaches all later rows, by a fifth
    of what quantising costs. So they are close on average, and closer than to the original.
    """
    ours, theirs = (results[kernels, f"{name} {kind}"] for kernels in ("cpu", "reference"))
    assert isinstance(ours, torch.Tensor), ours
    assert isinstance(theirs, torch.Tensor), theirs
    apart = (ours - theirs).abs().mean()
    lost = (ours - torch.load(checkpoints / f"{name}.pt")["logits"]).abs().mean()
    assert apart < lost / 4
    if kind == "int8-weight-only":
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    assert lost < 1
