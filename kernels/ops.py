"""One table of operations, filled by `use` from a back end.

The only place that asks what hardware this is. Callers write `ops.rms_norm(x, weight, eps)` and
never learn which implementation ran. What each operation means, its shapes and its dtypes, is said
in `headgate.kernels.reference`. A back end is a module with `available() -> bool` and
`OPS: dict[str, Callable]` holding the operations it has; the reference does the rest, but for the
few in OPTIONAL: whoever uses those asks `optional` first, and has another way. A back end that can
give a row the same bits whatever is in the batch has `BATCH_INVARIANT`, with the operations that
then take the place of those in OPS. `rms_norm_linear`
and `gated_mlp` are made of other operations here, where the back end does not have them as one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headgate.kernels import reference
from headgate.kernels.philox import Draw

if TYPE_CHECKING:
    from headgate.kernels.int4_weight import Int4Weight
    from headgate.kernels.int8_cache import PagedCache
    from headgate.shard.attention_metadata import AttentionMetadata

Activation = Literal["silu", "gelu", "gelu_tanh"]
Product = tuple[Any, torch.Tensor | None]  # a packed weight and a bias, as `linear` takes them
BACKENDS = ("reference", "cpu", "triton")
OPTIONAL = frozenset(
    {
        "sample_tokens",  # sampling without leaving the device
        "token_logprobs",
        "rms_norm_linear",  # passes over the activations saved
        "gated_mlp",
        "make_shortlist",  # the likeliest tokens for less than all logits
        "linear_largest",
        "likeliest_tokens",  # chosen by all ranks together
    }
)
_DEVICE_BACKEND = {"cpu": "cpu", "cuda": "triton"}


class Ranks(Protocol):
    """Processes that make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' float32 or int64 tensors, summed in place."""


_table: dict[str, Callable[..., Any]] = dict(reference.OPS)
_active = "reference"


class BackendUnavailable(RuntimeError):
    """The back end asked for is not built or does not run on this machine."""


def use(name: str = "", device: str = "cpu", *, batch_invariant: bool = False) -> str:
    """Fills the table from back end `name` ("" = the best there is for `device`); returns its name.

    batch_invariant: a row's bits must not depend on the rows beside it, at whatever cost. Raises
    BackendUnavailable when a back end asked for by name cannot run here, or none can do that.
    """
    global _active
    if name and name not in BACKENDS:
        raise BackendUnavailable(f"unknown kernels {name!r}; there are {', '.join(BACKENDS)}")
    wanted = name or _DEVICE_BACKEND.get(device, "reference")
    offered = _load(wanted)
    if offered is None and name:
        raise BackendUnavailable(f"the {name!r} kernels are not available on this machine")
    unknown = sorted(set(offered or ()) - set(reference.OPS) - OPTIONAL)
    if unknown:
        raise BackendUnavailable(f"the {wanted!r} kernels offer operations unknown here: {unknown}")
    _table.clear()
    _table.update({**reference.OPS, **(offered or {})})
    _active = wanted if offered is not None else "reference"
    if batch_invariant:
        module = sys.modules.get(f"headgate.kernels.{_active}")
        invariant = getattr(module, "BATCH_INVARIANT", None)
        if invariant is None:
            raise BackendUnavailable(
                f"--batch-invariant: products of the {_active!r} kernels depend on the number of "
                "rows, those of cpu and triton need not"
            )
        _table.update(invariant)
    return _active


def optional(name: str) -> Callable[..., Any] | None:
    """The operation `name` of OPTIONAL where the back end in use has it."""
    return _table.get(name)


def can_record() -> bool:
    """Whether the back end's calls can be recorded and replayed, on this machine."""
    module = sys.modules.get(f"headgate.kernels.{_active}")
    return bool(getattr(module, "can_record", lambda: False)())


def active() -> str:
    """Name of the back end in use."""
    return _active


def _load(name: str) -> dict[str, Callable[..., Any]] | None:
    """What a back end offers; None where it is not built or cannot run."""
    if name == "reference":
        return {}
    module_name = f"headgate.kernels.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Not shipped, or its compiler (say triton) is not installed. Errors inside it are errors.
        if error.name and error.name.startswith("headgate.") and error.name != module_name:
            raise
        return None
    return dict(module.OPS) if module.available() else None


def embedding(
    ids: torch.Tensor, weight: torch.Tensor, first_id: int, dtype: torch.dtype
) -> torch.Tensor:
    return _table["embedding"](ids, weight, first_id, dtype)


def take_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return _table["take_rows"](x, indices)


def pack_linear(
    weight: torch.Tensor, dtype: torch.dtype, quantize: str = "", precision: str = "highest"
) -> Any:
    """What `linear` takes as its weight: the tensor itself, or the back end's packed form of it.

    `quantize`: a kind of headgate.kernels.quantised, or "" to keep values of `dtype`. `precision`:
    "medium" (with bfloat16 weights on a CPU) rounds inputs to bfloat16 before they are multiplied.
    """
    return _table["pack_linear"](weight, dtype, quantize, precision)


def linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _table["linear"](x, weight, bias)


def make_shortlist(table: torch.Tensor, weight: Any) -> Any | None:
    """What `linear_largest` needs beside the packed form `weight` of `table`[N, K], which is kept;
    None where that would not be faster than `linear`."""
    offered = optional("make_shortlist")
    return None if offered is None else offered(table, weight)


def linear_largest(
    x: torch.Tensor, weight: Any, shortlist: Any, largest: int, ranks: Ranks
) -> torch.Tensor:
    """`linear` of x[R, K]; where `largest` is 1, not 0, all ranks' columns side by side have that
    one's largest value of each row, first at the same place, and other values that are smaller.

    `shortlist`: of the same weight. `ranks`: those that have a part of the columns each, and the
    same rows. An operation of the back ends that make a shortlist.
    """
    return _table["linear_largest"](x, weight, shortlist, largest, ranks)


def rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    weight: Any,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`linear` of the `rms_norm` of x + residual, x + residual); a residual of None adds nothing.

    `norm`: the norm's weight. `weight`: packed. x may be parts, as for `rms_norm_residual`. May
    overwrite x and residual.
    """
    fused = optional("rms_norm_linear")
    if fused is not None:
        return fused(x, residual, norm, eps, weight, bias)
    if residual is None:
        return linear(rms_norm(x, norm, eps), weight, bias), x
    normed, total = rms_norm_residual(x, residual, norm, eps)
    return linear(normed, weight, bias), total


def gated_mlp(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    gate_up: Product,
    activation: Activation,
    down: Product,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`down` of activation(gate) * up, x + residual), where [gate, up] is `gate_up` of the
    `rms_norm` of x + residual, as in `rms_norm_linear`."""
    fused = optional("gated_mlp")
    if fused is not None:
        return fused(x, residual, norm, eps, gate_up, activation, down)
    both, total = rms_norm_linear(x, residual, norm, eps, *gate_up)
    if activation == "silu":
        return linear(silu_and_mul(both), *down), total
    return linear(gelu_and_mul(both, tanh=activation == "gelu_tanh"), *down), total


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return _table["linear_int8"](x, weight, scales, bias)


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return _table["linear_fp8"](x, weight, scales, bias)


def linear_int4(
    x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return _table["linear_int4"](x, weight, bias)


def route(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _table["route"](logits, top_k, renormalise)


def moe_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    return _table["moe_mlp"](x, experts, weights, gate_up, down)


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    return _table["add_lora"](y, x, slots, a, b, scaling)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _table["rms_norm"](x, weight, eps)


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _table["rms_norm_residual"](x, residual, weight, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return _table["layer_norm"](x, weight, bias, eps)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _table["silu_and_mul"](x)


def gelu_and_mul(x: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    return _table["gelu_and_mul"](x, tanh)


def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _table["rotary_embedding"](q, k, positions, cos_sin)


def rotary_and_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    slot_mapping: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    return _table["rotary_and_write_kv"](
        q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, norms
    )


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    slot_mapping: torch.Tensor,
) -> None:
    _table["write_kv"](k, v, k_cache, v_cache, slot_mapping)


def argmax(scores: torch.Tensor) -> npt.NDArray[np.int64]:
    return _table["argmax"](scores)


def likeliest_tokens(
    logits: torch.Tensor, first_id: int, wanted: int, ranks: Ranks
) -> torch.Tensor:
    """Where `wanted` is 1, not 0, int64[R] on all ranks: what `argmax` finds of all their logits
    side by side. logits: float32[R, V] of this rank's tokens, from `first_id` on."""
    return _table["likeliest_tokens"](logits, first_id, wanted, ranks)


def gumbel_argmax(
    scores: npt.NDArray[np.float32], best: float, temperature: float, draw: Draw
) -> int:
    return _table["gumbel_argmax"](scores, best, temperature, draw)


def paged_attention(
    q: torch.Tensor,
    k_cache: PagedCache,
    v_cache: PagedCache,
    attention: AttentionMetadata,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    rounded: bool = False,
) -> torch.Tensor:
    """`rounded` is for CPUs: on a GPU queries are, and weights become what its kernels say."""
    call = (q, k_cache, v_cache, attention, scale, window, soft_cap, alibi_slopes)
    if q.device.type == "cpu" and _active != "triton":
        return _table["paged_attention"](*call, rounded)
    return _table["paged_attention"](*call)
