"""Operations at the shapes of published models: what the report compiles and the benchmark times.

A case makes its tensors through a `Maker`, on a GPU with values or anywhere without memory, and
calls the launcher that serving calls. A new kernel is one more generator here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from headgate.kernels import triton as kernels
from headgate.kernels.int4_weight import Int4Weight
from headgate.kernels.int8_cache import SCALE_BYTES, Int8Cache, PagedCache
from headgate.kernels.quantised import QuantisedTensor
from headgate.kernels.reference_products import FP8, FP8_BLOCK
from headgate.kernels.sampled_rows import MaskedRows, PenalisedRows, RowsToSample
from headgate.kernels.triton import linear
from headgate.kernels.triton.packed_weight import PackedQuantised
from headgate.quant_kinds import KINDS, QuantKind

CHIPS = ("sm_80", "sm_89", "sm_90", "sm_100")  # whose kernels are compiled for the report
FP8_CHIPS = ("sm_89", "sm_90", "sm_100")

_BLOCK_SIZE = 16
_GROUP = 128  # of int4 checkpoints
_TOP_K = 2
_ADAPTERS, _RANK = 8, 16
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
    experts: int = 0  # of which each token takes 2
    ranks: int = 1


MODELS = (
    ModelShape("Llama-3-8B", 4096, 14336, 32, 8, 128, 128256),
    ModelShape("Llama-3-70B / 8", 8192, 3584, 8, 1, 128, 16032, ranks=8),
    ModelShape("Qwen3-0.6B", 1024, 3072, 16, 8, 128, 151936, qk_norm=True),
    ModelShape("Mixtral-8x7B", 4096, 14336, 32, 8, 128, 32000, experts=8),
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

    def scales(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """Positive numbers around 1."""
        return self.normal(*shape, dtype=torch.float32).abs().add(0.5).to(dtype)

    def whole(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Whole numbers in [low, high)."""
        return torch.randint(low, high, shape, device=self.device, dtype=dtype)

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
    chips: tuple[str, ...] = CHIPS  # that have the instructions it needs

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

    def norm(maker: Maker) -> Callable[[], Any]:
        x, weight = maker.normal(tokens, width), maker.normal(width)
        return lambda: kernels.OPS["rms_norm"](x, weight, 1e-5)

    def residual_norm(maker: Maker, *parts: int) -> Callable[[], Any]:
        x, weight = maker.normal(*parts, tokens, width), maker.normal(width)
        beside = maker.normal(tokens, width)
        return lambda: kernels.OPS["rms_norm_residual"](x, beside, weight, 1e-5)

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
        ("rms_norm", norm, 2 * row, 4 * tokens * width),
        ("rms_norm_residual", residual_norm, 4 * row, 5 * tokens * width),
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
    if model.ranks > 1:
        listed.append(
            (
                "rms_norm_residual of parts",
                lambda maker: residual_norm(maker, model.ranks),
                (3 + model.ranks) * row,
                (4 + model.ranks) * tokens * width,
            )
        )
    for op, make, nbytes, operations in listed:
        yield Case(op, model.name, step.name, make, nbytes, operations)


def attention_cases(model: ModelShape, step: StepShape) -> Iterator[Case]:
    """Rotation with the write of KV, the write alone, and attention."""
    yield from _cached_cases(model, step, DTYPE)


def int8_cache_cases(model: ModelShape, step: StepShape) -> Iterator[Case]:
    """The same with keys and values in int8."""
    yield from _cached_cases(model, step, torch.int8)


def _cached_cases(model: ModelShape, step: StepShape, kept: torch.dtype) -> Iterator[Case]:
    tokens, heads, kv_heads, dim = step.tokens, model.heads, model.kv_heads, model.dim
    int8 = kept == torch.int8

    def cache(maker: Maker, *shape: int) -> PagedCache:
        if not int8:
            return maker.normal(*shape)
        blocks, block_size, *_ = shape
        scales = maker.scales(blocks, kv_heads, block_size, dtype=torch.float32) / 64  # keys near 1
        return Int8Cache(maker.whole(-127, 128, *shape, dtype=kept), scales)

    def made(maker: Maker) -> tuple[torch.Tensor, tuple[PagedCache, PagedCache], Any]:
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
        return fused, (cache(maker, *shape), cache(maker, *shape)), metadata

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

    new = 2 * kv_heads * dim * DTYPE.itemsize  # a token's keys and values, and as they are kept
    kv = 2 * kv_heads * (dim * kept.itemsize + (SCALE_BYTES if int8 else 0))
    queries = heads * dim * DTYPE.itemsize
    turned = tokens * (2 * queries + new + kv + 4 * dim)
    pairs = step.rows * (step.query * step.context - step.query * (step.query - 1) / 2)
    listed = [
        ("rotary_and_write_kv", rotary, turned, 3 * tokens * (heads + kv_heads) * dim),
        ("write_kv", write, tokens * (new + kv), 0),
        (
            "paged_attention",
            attend,
            step.rows * step.context * kv + 2 * tokens * queries,
            4 * pairs * heads * dim,
        ),
    ]
    for op, make, nbytes, operations in listed:
        name = f"{op}, int8 cache" if int8 else op
        yield Case(name, model.name, step.name, make, nbytes, operations)


def product_cases(model: ModelShape, step: StepShape) -> Iterator[Case]:
    """Linear layers, at the shape of gate and up."""
    tokens, width, inner = step.tokens, 2 * model.intermediate, model.hidden

    def bytes_of(kind: QuantKind) -> float:
        """Of a weight, with its share of scale and minimum."""
        return 0.5 + 4 / kind.group if kind.offset else 1 + 2 / kind.group

    def quantised(maker: Maker, kind: QuantKind) -> Callable[[], Any]:
        groups = inner // kind.group
        low, high = (0, 16) if kind.offset else (-127, 128)
        values = maker.whole(low, high, width, groups, kind.group, dtype=torch.int8)
        scales = maker.scales(width, 1 if kind.per_channel else groups)
        quantised = QuantisedTensor(kind, inner, values, scales, -scales if kind.offset else None)
        weight: Any = quantised  # as the reference takes it
        if kernels.OPS["linear"] is linear.linear:
            weight = PackedQuantised.of(quantised)
        x = maker.normal(tokens, inner)
        return lambda: kernels.OPS["linear"](x, weight, None)

    def dense(maker: Maker, ops: dict[str, Callable[..., Any]]) -> Callable[[], Any]:
        weight, x = maker.normal(width, inner), maker.normal(tokens, inner)
        return lambda: ops["linear"](x, weight, None)

    def int8(maker: Maker) -> Callable[[], Any]:
        weight = maker.whole(-127, 128, width, inner, dtype=torch.int8)
        x, scales = maker.normal(tokens, inner), maker.scales(width, dtype=torch.float32)
        return lambda: kernels.OPS["linear_int8"](x, weight, scales, None)

    def fp8(maker: Maker, *scaled: int) -> Callable[[], Any]:
        weight, x = maker.normal(width, inner, dtype=FP8), maker.normal(tokens, inner)
        scales = maker.scales(*scaled, dtype=torch.float32)
        return lambda: kernels.OPS["linear_fp8"](x, weight, scales, None)

    def int4(maker: Maker, awq: bool) -> Callable[[], Any]:
        packed = (inner, width // 8) if awq else (inner // 8, width)
        zeros = (inner // _GROUP, width // 8)
        words = partial(maker.whole, -(2**31), 2**31, dtype=torch.int32)
        scales = maker.scales(inner // _GROUP, width)
        weight = Int4Weight("awq" if awq else "gptq", words(*packed), words(*zeros), scales, _GROUP)
        x = maker.normal(tokens, inner)
        return lambda: kernels.OPS["linear_int4"](x, weight, None)

    values = width * inner
    block_scales = (width // FP8_BLOCK, inner // FP8_BLOCK)
    listed: list[tuple[str, Callable[[Maker], Callable[[], Any]], float]] = [
        *(
            (f"linear {kind.name}", partial(quantised, kind=kind), values * bytes_of(kind))
            for kind in KINDS.values()
        ),
        ("linear", lambda maker: dense(maker, kernels.OPS), values * DTYPE.itemsize),
        (
            "linear, batch-invariant",
            lambda maker: dense(maker, kernels.BATCH_INVARIANT),
            values * DTYPE.itemsize,
        ),
        ("linear_int8", int8, values),
        ("linear_fp8, a tensor's scale", lambda maker: fp8(maker, 1), values),
        ("linear_fp8, channels", lambda maker: fp8(maker, width), values),
        ("linear_fp8, blocks", lambda maker: fp8(maker, *block_scales), values),
        ("linear_int4, GPTQ", lambda maker: int4(maker, False), values * (0.5 + 2.5 / _GROUP)),
        ("linear_int4, AWQ", lambda maker: int4(maker, True), values * (0.5 + 2.5 / _GROUP)),
    ]
    moved = tokens * (inner + width) * DTYPE.itemsize
    for op, make, nbytes in listed:
        chips = FP8_CHIPS if "fp8" in op else CHIPS
        work = 2 * tokens * values
        yield Case(op, model.name, step.name, make, nbytes + moved, work, chips)


def grouped_cases(model: ModelShape, step: StepShape) -> Iterator[Case]:
    """Adapters; experts, where the model has them."""
    tokens, width, inner = step.tokens, model.hidden, model.intermediate

    def lora(maker: Maker) -> Callable[[], Any]:
        x, y = maker.normal(tokens, width), maker.normal(tokens, width)
        a, b = maker.normal(_ADAPTERS, _RANK, width), maker.normal(_ADAPTERS, width, _RANK)
        slots = maker.integers(torch.arange(tokens) % _ADAPTERS, torch.int32)
        scaling = maker.scales(_ADAPTERS, dtype=torch.float32)
        return lambda: kernels.OPS["add_lora"](y, x, slots, a, b, scaling)

    def route(maker: Maker) -> Callable[[], Any]:
        logits = maker.normal(tokens, model.experts)
        return lambda: kernels.OPS["route"](logits, _TOP_K, True)

    def moe(maker: Maker) -> Callable[[], Any]:
        x = maker.normal(tokens, width)
        numbers = torch.arange(tokens * _TOP_K) % model.experts
        experts = maker.integers(numbers.view(tokens, _TOP_K), torch.int32)
        weights = maker.scales(tokens, _TOP_K, dtype=torch.float32)
        gate_up = maker.normal(model.experts, 2 * inner, width)
        down = maker.normal(model.experts, width, inner)
        return lambda: kernels.OPS["moe_mlp"](x, experts, weights, gate_up, down)

    item = DTYPE.itemsize
    low = min(_ADAPTERS, tokens) * 2 * _RANK * width * item
    work = 4 * tokens * _RANK * width
    yield Case("add_lora", model.name, step.name, lora, low + 3 * tokens * width * item, work)
    if model.experts:
        routed = tokens * model.experts * item + 8 * tokens * _TOP_K
        yield Case("route", model.name, step.name, route, routed, 5 * tokens * model.experts)
        weights = 3 * min(model.experts, tokens * _TOP_K) * inner * width * item
        work = 6 * tokens * _TOP_K * inner * width
        yield Case("moe_mlp", model.name, step.name, moe, weights + 2 * tokens * width * item, work)


def sampling_cases(model: ModelShape, step: StepShape) -> Iterator[Case]:
    """One token for each row, with every kind of parameters, and logprobs."""
    rows, vocabulary = step.rows, model.vocabulary

    def sample(maker: Maker) -> Callable[[], Any]:
        logits = maker.normal(rows, vocabulary, dtype=torch.float32)

        def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return maker.integers(torch.full((rows,), value), dtype)

        history = 100
        every = maker.integers(torch.arange(rows), torch.int32)
        penalised = PenalisedRows(
            rows=every,
            repetition=column(1.1),
            frequency=column(0.1),
            presence=column(0.1),
            token_ids=maker.integers(torch.arange(rows * history) % vocabulary, torch.int32),
            starts=maker.integers(torch.arange(rows + 1) * history, torch.int32),
            num_prompt=column(history // 2, torch.int32),
            longest=history,
        )
        bits = maker.integers(torch.full((rows, -(-vocabulary // 32)), -1), torch.int32)
        columns = RowsToSample(
            temperature=column(0.8),
            top_k=column(50, torch.int32),
            top_p=column(0.9),
            typical_p=column(0.95),
            min_p=column(0.01),
            seed=column(1, torch.int64),
            position=column(1, torch.int32),
            sample_index=column(0, torch.int32),
            penalised=penalised,
            masked=MaskedRows(every, bits),
        )
        return lambda: kernels.OPS["sample_tokens"](logits, columns)

    def logprobs(maker: Maker) -> Callable[[], Any]:
        logits = maker.normal(rows, vocabulary, dtype=torch.float32)
        tokens = maker.integers(torch.arange(rows))
        return lambda: kernels.OPS["token_logprobs"](logits, tokens, 5)

    once = rows * vocabulary * 4
    # The copy, the count table and its use, the mask, the best score and the draw.
    yield Case("sample_tokens", model.name, step.name, sample, 10 * once, 60 * rows * vocabulary)
    yield Case("token_logprobs", model.name, step.name, logprobs, 2 * once, 3 * rows * vocabulary)


GENERATORS: tuple[Callable[[ModelShape, StepShape], Iterator[Case]], ...] = (
    token_cases,
    attention_cases,
    int8_cache_cases,
    product_cases,
    grouped_cases,
    sampling_cases,
)
