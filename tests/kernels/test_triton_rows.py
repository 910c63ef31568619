"""A row's bits don't depend on the rows beside it, in any operation.

That the machine code does not either is checked by the report, see test_triton_report.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from headgate import quant_kinds
from headgate.kernels import quantised, triton
from headgate.kernels.reference_products import FP8
from headgate.kernels.triton import paged_attention, product
from headgate.kernels.triton.packed_weight import PackedQuantised
from tests.kernels.randoms import Randoms
from tests.kernels.test_triton_products import int4_weight

OPS = triton.OPS
ROWS = 64
PRODUCT_ROWS = 130  # three tiles
PARTS = (slice(0, 64), slice(5, 12), slice(9, 10))
# Of one row at a time, or with tests of their own for what differs between batches.
ELSEWHERE = {"pack_linear", "sample_tokens"}

Call = Callable[[slice], torch.Tensor]  # the result's rows


def token_calls(randoms: Randoms) -> dict[str, Call]:
    x, residual, parts = randoms(ROWS, 96), randoms(ROWS, 96), randoms(2, ROWS, 96)
    weight, table = randoms(96), randoms(50, 96)
    ids, logits = randoms.integers(0, 60, ROWS), randoms(ROWS, 70)
    return {
        "rms_norm": lambda rows: OPS["rms_norm"](x[rows], weight, 1e-5),
        "rms_norm_residual": lambda rows: torch.cat(
            OPS["rms_norm_residual"](parts[:, rows].clone(), residual[rows].clone(), weight, 1e-5),
            1,
        ),
        "layer_norm": lambda rows: OPS["layer_norm"](x[rows], weight, weight, 1e-5),
        "silu_and_mul": lambda rows: OPS["silu_and_mul"](x[rows]),
        "gelu_and_mul": lambda rows: OPS["gelu_and_mul"](x[rows], True),
        "embedding": lambda rows: OPS["embedding"](ids[rows], table, 5, torch.float32),
        "route": lambda rows: torch.cat(OPS["route"](logits[rows], 3, True), 1),
        "token_logprobs": lambda rows: torch.cat(
            [
                part.view(len(ids[rows]), -1)
                for part in OPS["token_logprobs"](logits[rows], ids[rows], 2)
            ],
            1,
        ),
    }


def attention_calls(randoms: Randoms) -> dict[str, Call]:
    fused = randoms(ROWS, 4, 16)  # of two heads for one of keys and values
    table, slots = randoms(ROWS, 16), torch.randperm(ROWS).to(fused.device)
    kept = randoms(2, ROWS // 2, 2, 1, 16)
    contexts = randoms.integers(1, 100, ROWS).int()
    blocks = randoms.integers(0, ROWS // 2, ROWS, 50).int()

    def split(rows: slice) -> tuple[torch.Tensor, ...]:
        return fused[rows].clone().split((2, 1, 1), 1)

    def written(rows: slice, op: str) -> torch.Tensor:
        q, k, v = split(rows)
        caches = [torch.zeros(ROWS, 1, 1, 16, device=fused.device) for _ in range(2)]
        if op == "write_kv":
            OPS[op](k, v, *caches, slots[rows])
        else:
            OPS[op](q, k, v, slots[rows], table, *caches, slots[rows])
        return torch.cat([q, *(cache[slots[rows], 0] for cache in caches)], 1)

    def attended(rows: slice) -> torch.Tensor:
        count = len(contexts[rows])
        metadata = SimpleNamespace(
            cu_query_lens=torch.arange(count + 1, device=fused.device).int(),
            context_lens=contexts[rows].contiguous(),
            block_tables=blocks[rows, : -(-int(contexts[rows].max()) // 2)].contiguous(),
            max_query_len=1,
            max_context_len=int(contexts[rows].max()),
        )
        return OPS["paged_attention"](split(rows)[0], *kept, metadata, 0.3, 0, 0.0)

    return {
        "rotary_embedding": lambda rows: torch.cat(
            OPS["rotary_embedding"](*split(rows)[:2], slots[rows], table), 1
        ),
        "rotary_and_write_kv": lambda rows: written(rows, "rotary_and_write_kv"),
        "write_kv": lambda rows: written(rows, "write_kv"),
        "paged_attention": attended,
    }


def product_calls(randoms: Randoms) -> dict[str, Call]:
    x, y, weight = randoms(PRODUCT_ROWS, 192), randoms(PRODUCT_ROWS, 40), randoms(40, 192)
    packed = PackedQuantised.of(quantised.quantise(weight, quant_kinds.KINDS["int4"]))
    whole, scales = randoms.integers(-127, 128, 40, 192).to(torch.int8), randoms(40).abs()
    int4 = int4_weight(randoms, "gptq", (40, 192), 32)[0]
    a, b = randoms(3, 8, 192), randoms(3, 40, 8)
    slots, scaling = randoms.integers(-1, 3, PRODUCT_ROWS).int(), randoms(3)
    experts, shares = randoms.integers(0, 3, PRODUCT_ROWS, 2).int(), randoms(PRODUCT_ROWS, 2)
    gate_up, down = randoms(3, 32, 192), randoms(3, 24, 16)
    return {
        "linear": lambda rows: OPS["linear"](x[rows], packed, None),
        "batch-invariant linear": lambda rows: triton.BATCH_INVARIANT["linear"](
            x[rows], weight, None
        ),
        "linear_int8": lambda rows: OPS["linear_int8"](x[rows], whole, scales, None),
        "linear_fp8": lambda rows: OPS["linear_fp8"](x[rows], weight.to(FP8), scales, None),
        "linear_int4": lambda rows: OPS["linear_int4"](x[rows], int4, None),
        "add_lora": lambda rows: OPS["add_lora"](
            y[rows].clone(), x[rows], slots[rows], a, b, scaling
        ),
        "moe_mlp": lambda rows: OPS["moe_mlp"](
            x[rows, :192], experts[rows], shares[rows], gate_up, down
        ),
    }


def test_bits_at_1_7_64_and_130_rows(randoms: Randoms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products add their splits side by side up to two tiles of rows, and one after another from
    three on; contexts have several partitions."""
    monkeypatch.setattr(product, "_SHORTEST_SPLIT", 64)
    monkeypatch.setattr(product, "_ENOUGH_PROGRAMS", 3)
    monkeypatch.setattr(paged_attention, "PARTITION", 64)
    by_row = token_calls(randoms) | attention_calls(randoms)
    products = product_calls(randoms)
    assert set(by_row) | set(products) == set(OPS) - ELSEWHERE | {"batch-invariant linear"}
    for calls, most in ((by_row, ROWS), (products, PRODUCT_ROWS)):
        for name, call in calls.items():
            whole = call(slice(0, most))
            for part in PARTS[most == ROWS :]:  # of which the first is all there are
                assert torch.equal(call(part), whole[part]), f"{name}, rows {part}"
