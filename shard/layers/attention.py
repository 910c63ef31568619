"""Self-attention on a norm, over the paged KV cache, split by heads."""

from __future__ import annotations

import torch

from headgate.kernels import ops
from headgate.kernels.int8_cache import PagedCache
from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.layers.linear import RowLinear
from headgate.shard.layers.norm import RMSNorm
from headgate.shard.layers.qkv import QkvLinear
from headgate.shard.layers.rotary import HeadNorms, RotaryEmbedding
from headgate.shard.load_context import LoadContext


class Attention:
    """Grouped-query attention of this rank's heads. `prefix`: such as model.layers.0.self_attn.

    `window` > 0: a token sees only the last `window` positions, its own included; their KV is kept
    for the whole sequence all the same. Beside weights whose products round their inputs it may
    round too (see `paged_attention` in headgate.kernels.reference).
    """

    def __init__(
        self,
        context: LoadContext,
        prefix: str,
        norm: RMSNorm,
        rotary: RotaryEmbedding,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
        window: int = 0,
    ) -> None:
        self._head_dim = context.config.head_dim
        self._q_size = len(context.heads) * self._head_dim
        self._kv_size = len(context.kv_heads) * self._head_dim
        self._scale = self._head_dim**-0.5
        self._window = window
        self._rounded = context.weights.rounds_inputs
        self._norm = norm
        self._rotary = rotary
        self._qkv = QkvLinear(context, prefix, qkv_bias)
        self._output = RowLinear.output(context, f"{prefix}.o_proj", output_bias)
        self._head_norms: HeadNorms | None = None
        if qk_norm:
            q, k = (RMSNorm(context, f"{prefix}.{x}_norm", self._head_dim) for x in "qk")
            self._head_norms = (q.weight, k.weight, q.eps)

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        kv: tuple[PagedCache, PagedCache],
        attention: AttentionMetadata,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual[T, hidden_size] to (what it makes of the norm of their sum, or parts of it
        for the next norm; their sum), of the tokens `wanted`, int64[W], or of all; stores all
        tokens' KV in `kv`. No residual adds nothing."""
        qkv, residual = self._qkv.after_norm(self._norm, x, residual)
        tokens = len(qkv)
        parts = qkv.split((self._q_size, self._kv_size, self._kv_size), dim=-1)
        q, k, v = (part.view(tokens, -1, self._head_dim) for part in parts)
        q = self._rotary(q, k, v, positions, kv, attention.slot_mapping, self._head_norms)
        out = ops.paged_attention(
            q, *kv, attention, self._scale, self._window, rounded=self._rounded
        )
        out = out.reshape(tokens, self._q_size)
        if wanted is not None:
            out, residual = ops.take_rows(out, wanted), ops.take_rows(residual, wanted)
        return self._output.parts(out), residual
