"""One rank of a parity run: computes every case with Headgate; rank 0 saves the logits.

Run as `python -m tests.parity.rank CHECKPOINTS OUTPUT` with the group's environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from headgate.shard.distributed import Group, init_group
from headgate.shard.models.registry import load_model
from tests.parity.cases import CASES, Case
from tests.parity.paged import PagedRows

CHUNK = 7


def run_case(case: Case, checkpoints: Path, group: Group) -> torch.Tensor | None:
    """Logits [tokens, vocab] of the reference's ids: the prompt, then single tokens; None beyond rank 0.

    Two more rows compute beside it and must agree with it: one in chunks, one all at once and late.
    """
    model = load_model(
        checkpoints / case.name,
        dtype=case.dtype,
        device="cpu",
        group=group,
        max_positions=case.max_positions,
    )
    beats: list[int] = []
    model.heartbeat = lambda: beats.append(1)
    ids = torch.load(checkpoints / f"{case.name}.pt")["ids"].tolist()
    prompt, tail = ids[: case.prompt_length], ids[case.prompt_length :]
    rows = PagedRows(model, 3, len(ids))
    whole, chunked = [], []
    parts = [prompt[start : start + CHUNK] for start in range(0, len(prompt), CHUNK)]
    first, piece = rows.step([(0, prompt), (1, parts[0])])
    whole.append(first)
    chunked.append(piece)
    for part in parts[1:]:
        chunked += rows.step([(1, part)])
    assert len(beats) == model.num_layers * len(parts)
    late: list[torch.Tensor | None] = []
    for token in tail:
        mixed = rows.step([(1, [token]), (2, ids), (0, [token])] if not late
                          else [(0, [token]), (1, [token])])
        if late:
            whole.append(mixed[0])
            chunked.append(mixed[1])
        else:
            chunked.append(mixed[0])
            late.append(mixed[1])
            whole.append(mixed[2])
    if group.rank != 0:
        return None
    result = torch.cat([part for part in whole if part is not None])
    others = [torch.cat([part for part in chunked if part is not None])]
    others += [part for part in late if part is not None]
    for other in others:
        torch.testing.assert_close(other, result, atol=1e-4, rtol=0)
    return result


def main() -> None:
    torch.set_num_threads(1)
    checkpoints, output = Path(sys.argv[1]), Path(sys.argv[2])
    group = init_group("cpu", timeout=60)
    results = {}
    for case in CASES:
        try:
            results[case.name] = run_case(case, checkpoints, group)
        except AssertionError as error:
            results[case.name] = str(error)
    if group.rank == 0:
        torch.save(results, output)
    group.barrier()
    group.close()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
