"""One rank of a parity run: computes every case with Headgate; rank 0 saves the logits.

Run as `python -m tests.parity.rank CHECKPOINTS OUTPUT` with the group's environment.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path

import torch

from headgate.kernels import ops
from headgate.shard.distributed import Group, ProcessGroup, init_group
from headgate.shard.kv_cache import KVCacheLayout
from headgate.shard.models.base import CausalLM
from headgate.shard.models.registry import load_model
from headgate.shard.recorded_model import StepLimits, record_model
from tests.parity.cases import CASES, KERNELS, QUANTISED, Case
from tests.parity.paged import PagedRows

CHUNK = 7
# How far rows with the same ids may be apart. Quantised inputs turn the last bits by which torch's
# products differ with their sizes into steps of 1/127, but those of the C++ don't differ.
TOLERANCE = 1e-4
QUANTISED_TOLERANCE = {"reference": 1.0, "cpu": 0.0}


def run_case(
    case: Case, checkpoints: Path, group: Group, quantize: str = "", tolerance: float = TOLERANCE
) -> torch.Tensor | None:
    """Logits [tokens, vocab] of the reference's ids, the prompt whole, then token by token.

    Two more rows compute the same ids beside it and must agree with it: one takes the prompt in
    chunks, one everything at once, in a step with decoding rows. None beyond rank 0.
    """
    model = load_model(
        checkpoints / case.name,
        dtype=case.dtype,
        device="cpu",
        group=group,
        quantize=quantize,
        max_positions=case.max_positions,
    )
    check_replay(model, group)
    beats: list[int] = []
    model.heartbeat = lambda: beats.append(1)
    ids = torch.load(checkpoints / f"{case.name}.pt")["ids"].tolist()
    prompt, tail = ids[: case.prompt_length], ids[case.prompt_length :]
    rows = PagedRows(model, 3, len(ids))
    rows.step({0: prompt, 1: prompt[:CHUNK]})
    assert len(beats) == model.num_layers
    for start in range(CHUNK, len(prompt), CHUNK):
        rows.step({1: prompt[start : start + CHUNK]})
    for index, token in enumerate(tail):
        late = {2: ids} if index == 0 else {}
        rows.step({1: [token], **late, 0: [token]})
    if group.rank != 0:
        return None
    for other in (1, 2) if tail else (1,):
        torch.testing.assert_close(rows.logits(other), rows.logits(0), atol=tolerance, rtol=0)
    return rows.logits(0)


def check_replay(model: CausalLM, group: Group) -> None:
    """The C++ kernels' steps can be recorded, and replays give the same bits, on all ranks."""
    if ops.active() != "cpu":
        return
    layout = KVCacheLayout(
        model.num_layers, 8, model.num_local_kv_heads, model.head_dim, torch.float32
    )
    beats = ctypes.c_int64(0)
    limits = StepLimits(tokens=64, context=48, logits_rows=16)
    recorded = record_model(model, group, layout, limits, ctypes.addressof(beats))
    assert recorded is not None, "the log says why"
    assert beats.value > model.num_layers


def main() -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    checkpoints, output = Path(sys.argv[1]), Path(sys.argv[2])
    group = init_group("cpu", timeout=60)
    # As on GPUs: ranks' parts are gathered, and added by the norm that reads them.
    gathering = ProcessGroup(group.rank, group.world_size, gathers=True)
    groups = {"reference": gathering if group.world_size > 1 else group, "cpu": group}
    results: dict[tuple[str, str], torch.Tensor | str | None] = {}
    by_name = {case.name: case for case in CASES}
    work = [(case, "") for case in CASES] + [(by_name[name], kind) for name, kind in QUANTISED]
    for kernels in KERNELS:
        ops.use(kernels)
        for case, kind in work:
            tolerance = QUANTISED_TOLERANCE[kernels] if kind else TOLERANCE
            key = kernels, f"{case.name} {kind}".strip()
            try:
                results[key] = run_case(case, checkpoints, groups[kernels], kind, tolerance)
            except AssertionError as error:
                results[key] = str(error)
    if group.rank == 0:
        torch.save(results, output)
    group.barrier()
    group.close()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
