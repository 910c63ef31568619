"""The Triton back end: one operation a file, for NVIDIA GPUs and for Triton's interpreter.

What an operation means is said in `headgate.kernels.reference`, which also computes whatever a
kernel does not take (odd strides, widths beyond a program's registers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headgate.kernels.triton import (
    embedding,
    gated,
    grouped_linear,
    layer_norm,
    linear,
    linear_dense,
    linear_fp8,
    linear_int4,
    linear_int8,
    logprobs,
    lora,
    moe,
    paged_attention,
    rms_norm,
    rotary,
    sampling,
    write_kv,
)
from headgate.kernels.triton.launch import INTERPRETED

__all__ = ["BATCH_INVARIANT", "OPS", "available"]


def available() -> bool:
    """Whether there is a GPU, or the interpreter (TRITON_INTERPRET=1) stands in for it."""
    return bool(INTERPRETED.value) or torch.cuda.is_available()


OPS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        embedding.embedding,
        linear.pack_linear,
        linear.linear,
        linear_int8.linear_int8,
        linear_fp8.linear_fp8,
        linear_int4.linear_int4,
        grouped_linear.route,
        moe.moe_mlp,
        lora.add_lora,
        rms_norm.rms_norm,
        rms_norm.rms_norm_residual,
        layer_norm.layer_norm,
        gated.silu_and_mul,
        gated.gelu_and_mul,
        rotary.rotary_embedding,
        rotary.rotary_and_write_kv,
        write_kv.write_kv,
        paged_attention.paged_attention,
        sampling.sample_tokens,
        logprobs.token_logprobs,
    )
}

# What takes the place of OPS's with `--batch-invariant`.
BATCH_INVARIANT: dict[str, Callable[..., Any]] = {"linear": linear_dense.linear}
