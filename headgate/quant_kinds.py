"""The kinds of quantised weights, and what follows from them.

Imports no torch: the launcher asks too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuantKind:
    """`group`: values along K with one scale. `offset`: a weight is minimum + scale * value, with
    values 0..15; otherwise scale * value with -127..127. `inputs`: how many values along K of the
    inputs share a scale, whole groups; 0: inputs are not quantised. `per_channel`: groups are of
    the inputs, weights have one scale for each of the N rows."""

    name: str
    group: int
    inputs: int = 0
    offset: bool = False
    per_channel: bool = False

    @property
    def bytes_per_weight(self) -> float:
        """On a CPU: its value and its share of the group's scale and minimum; not of a channel's
        scale or unit. A GPU has two bytes more for each group of int4."""
        if self.per_channel:
            return 1.0
        return 1 / 2 + 2 / self.group if self.offset else 1 + 2 / self.group

    def padded(self, inner: int) -> int:
        """K filled up to whole groups, of weights and of inputs."""
        whole = max(self.group, self.inputs)
        return -(-inner // whole) * whole


KINDS = {
    kind.name: kind
    for kind in (
        QuantKind("int8", group=64, inputs=64, per_channel=True),
        QuantKind("int8-weight-only", group=32),
        QuantKind("int4", group=32, inputs=64, offset=True),
    )
}


def rounds_inputs(quantize: str, precision: str) -> bool:
    """Whether products take their inputs in fewer bits than float32, by --quantize ("": not) and
    --matmul-precision."""
    return KINDS[quantize].inputs > 0 if quantize else precision != "highest"


# Attention multiplies bytes where this divides the head dim.
BYTE_DIMS = 32


def cpu_kv_dtype(quantize: str, precision: str, head_dim: int) -> str:
    """How a CPU keeps keys and values if left alone.

    It answers as float32 arithmetic does, which asks for float32. Where products round their
    inputs, so does attention: to bytes as they do, where heads allow that, or to bfloat16. Beside
    int8-weight-only, whose products don't, float16 changes the least of what reads half as much.
    """
    if not rounds_inputs(quantize, precision):
        return "float16" if quantize else "float32"
    return "int8" if quantize and head_dim % BYTE_DIMS == 0 else "bfloat16"
