"""Operations at the shapes of published models: what the report compiles and the benchmark times.

A case makes its tensors through a `Maker`, on a GPU with values or anywhere without memory, and
calls the launcher that serving calls. A new kernel is one more generator here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from headgate.kernels import triton as kernels

_BLOCK_SIZE = 16
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One rank's share of a model."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    qk_norm: bool = False


MODELS = (
    ModelShape("Llama-3-8B", 4096, 14336, 32, 8, 128, 128256),
    ModelShape("Llama-3-70B / 8", 8192, 3584, 8, 1, 128, 16032),
    ModelShape("Qwen3-0.6B", 1024, 3072, 16, 8, 128, 151936, qk_norm=True),
    ModelShape("Mixtral-8x7B", 4096, 14336, 32, 8, 128, 32000),
)


@dataclass(frozen=True, slots=True)
class StepShape:
    """`rows` rows that compute `query` tokens each, the last of `context` positions."""

    name: str
    rows: int
    query: int
    context: int

    @property
    def tokens(self) -> int:
        return self.rows * self.query


STEPS = (StepShape("decode 64 at 4096", 64, 1, 4096), StepShape("prefill 2048", 1, 2048, 2048))


class Maker:
    """Tensors on `device`; on "meta" they have no memory and no values."""

    def __init__(self, device: str) -> None:
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, device=self.device).to(dtype)

    def integers(self, values: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return values.to(dtype).to(self.device)


@dataclass(frozen=True, slots=True)
class Case:
    """One operation. `make` returns the call; `nbytes` and `operations` are the least it takes."""

    op: str
    model: str
    step: str
    make: Callable[[Maker], Callable[[], Any]]
    nbytes: float
    operations: float

    @property
    def name(self) -> str:
        return f"{self.op}, {self.model}, {self.step}"


def all_cases() -> Iterator[Case]:
    for model in MODELS:
        for step in STEPS:
            for generate in GENERATORS:
                yield from generate(model, step)


def token_cases(model: ModelShape, step: StepShape) -> Iterator[Case]:
    """What runs token by token: norms, gates, the embedding."""
    tokens, width, inner = step.tokens, model.hidden, model.intermediate
    row = tokens * width * DTYPE.itemsize

    def norm(maker: Maker, residual: bool) -> Callable[[], Any]:
        x, weight = maker.normal(tokens, width), maker.normal(width)
        if residual:
            beside = maker.normal(tokens, width)
            return lambda: kernels.OPS["rms_norm_residual"](x, beside, weight, 1e-5)
        return lambda: kernels.OPS["rms_norm"](x, weight, 1e-5)

    def head_norm(maker: Maker) -> Callable[[], Any]:
        fused = maker.normal(tokens, model.heads + 2 * model.kv_heads, model.dim)
        weight = maker.normal(model.dim)
        return lambda: kernels.OPS["rms_norm"](fused[:, : model.heads], weight, 1e-6)

    def layer_norm(maker: Maker) -> Callable[[], Any]:
        x, weight, bias = maker.normal(tokens, width), maker.normal(width), maker.normal(width)
        return lambda: kernels.OPS["layer_norm"](x, weight, bias, 1e-5)

    def gate(maker: Maker, op: str, *more: bool) -> Callable[[], Any]:
        x = maker.normal(tokens, 2 * inner)
        return lambda: kernels.OPS[op](x, *more)

    def embedding(maker: Maker) -> Callable[[], Any]:
        weight = maker.normal(model.vocabulary, width)
        ids = maker.integers(torch.arange(tokens) * 7 % model.vocabulary)
        return lambda: kernels.OPS["embedding"](ids, weight, 0, DTYPE)

    gate_bytes = 3 * tokens * inner * DTYPE.itemsize
    listed = [
        ("rms_norm", lambda maker: norm(maker, False), 2 * row, 4 * tokens * width),
        ("rms_norm_residual", lambda maker: norm(maker, True), 4 * row, 5 * tokens * width),
        ("layer_norm", layer_norm, 2 * row, 6 * tokens * width),
        ("silu_and_mul", lambda maker: gate(maker, "silu_and_mul"), gate_bytes, 5 * tokens * inner),
        (
            "gelu_and_mul",
            lambda maker: gate(maker, "gelu_and_mul", True),
            gate_bytes,
            12 * tokens * inner,
        ),
        ("embedding", embedding, 2 * row, 0),
    ]
    if model.qk_norm:
        heads = tokens * model.heads * model.dim
        listed.append(("rms_norm of heads", head_norm, 2 * heads * DTYPE.itemsize, 4 * heads))
    for op, make, nbytes, operations in listed:
        yield Case(op, model.name, step.name, make, nbytes, operations)


def attention_cases(model: ModelShape, step: StepShape) -> Iterator[Case]:
    """Rotation with the write of KV, the write alone, and attention."""
    tokens, heads, kv_heads, dim = step.tokens, model.heads, model.kv_heads, model.dim

    def made(maker: Maker) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], Any]:
        blocks = -(-step.context // _BLOCK_SIZE)
        order = torch.randperm(step.rows * blocks, generator=torch.Generator().manual_seed(0))
        metadata = SimpleNamespace(  # the fields of AttentionMetadata
            cu_query_lens=maker.integers(torch.arange(step.rows + 1) * step.query, torch.int32),
            context_lens=maker.integers(torch.full((step.rows,), step.context), torch.int32),
            block_tables=maker.integers(order.view(step.rows, blocks), torch.int32),
            slot_mapping=maker.integers(torch.arange(tokens)),
            max_query_len=step.query,
            max_context_len=step.context,
        )
        shape = (step.rows * blocks, _BLOCK_SIZE, kv_heads, dim)
        fused = maker.normal(tokens, heads + 2 * kv_heads, dim)
        return fused, (maker.normal(*shape), maker.normal(*shape)), metadata

    def rotary(maker: Maker) -> Callable[[], Any]:
        fused, caches, metadata = made(maker)
        q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
        positions = maker.integers(torch.arange(tokens) % step.context)
        table = maker.normal(step.context, dim, dtype=torch.float32)
        slots = metadata.slot_mapping
        return lambda: kernels.OPS["rotary_and_write_kv"](q, k, v, positions, table, *caches, slots)

    def write(maker: Maker) -> Callable[[], Any]:
        fused, caches, metadata = made(maker)
        k, v = fused[:, heads:].split(kv_heads, dim=1)
        return lambda: kernels.OPS["write_kv"](k, v, *caches, metadata.slot_mapping)

    def attend(maker: Maker) -> Callable[[], Any]:
        fused, caches, metadata = made(maker)
        q = fused[:, :heads]
        return lambda: kernels.OPS["paged_attention"](q, *caches, metadata, dim**-0.5, 0, 0.0)

    kv = 2 * kv_heads * dim * DTYPE.itemsize
    queries = heads * dim * DTYPE.itemsize
    turned = tokens * (2 * (queries + kv) + 4 * dim)
    pairs = step.rows * (step.query * step.context - step.query * (step.query - 1) / 2)
    listed = [
        ("rotary_and_write_kv", rotary, turned, 3 * tokens * (heads + kv_heads) * dim),
        ("write_kv", write, 2 * tokens * kv, 0),
        (
            "paged_attention",
            attend,
            step.rows * step.context * kv + 2 * tokens * queries,
            4 * pairs * heads * dim,
        ),
    ]
    for op, make, nbytes, operations in listed:
        yield Case(op, model.name, step.name, make, nbytes, operations)


GENERATORS: tuple[Callable[[ModelShape, StepShape], Iterator[Case]], ...] = (
    token_cases,
    attention_cases,
)
