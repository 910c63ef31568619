"""`python -m headgate.bench.quality`: what quantising a model costs, on a bundled text.

The text is given token by token (teacher-forced), in pieces that start afresh, to the model with
its weights as they are and float32 arithmetic, and to the model quantised or, as the kind
bf16-medium, with the inputs of products rounded to bfloat16. Those store keys and values as when
they are served on a CPU, or as --kv-cache-dtype says; the kind none, which keeps them in float16
unless told otherwise, does nothing else, and so tells what that costs. Told are the perplexity and
the share of positions at which both find the same token most likely. Exits with 1 where a kind
misses its floor; floors are those of the embedded model.

The text is the first two chapters of Jane Austen's Pride and Prejudice (London: T. Egerton, 1813),
spelt as in the editions of the later nineteenth century. It is in the public domain everywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from headgate.kernels import ops
from headgate.launcher.embedded_model import ensure_embedded_model
from headgate.quant_kinds import KINDS, cpu_kv_dtype
from headgate.shard.attention_metadata import AttentionMetadata
from headgate.shard.config import KV_DTYPES
from headgate.shard.distributed import single_group
from headgate.shard.kv_cache import KVCache, KVCacheLayout
from headgate.shard.models.base import CausalLM
from headgate.shard.models.registry import load_model

TEXT = Path(__file__).with_name("pride_and_prejudice.txt")
PIECE = 512  # tokens computed in one step, which see each other
_LOGITS_ROWS = 64  # in memory at once


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that is good enough, against the weights as they are."""

    perplexity_ratio: float
    same_tokens: float


PLAIN = "none"  # weights as they are: only keys and values are narrower
MEDIUM = "bf16-medium"  # --matmul-precision medium
FLOORS = {
    PLAIN: Floor(1.01, 0.97),
    MEDIUM: Floor(1.01, 0.97),
    "int8": Floor(1.03, 0.90),
    "int8-weight-only": Floor(1.01, 0.97),
    "int4": Floor(1.15, 0.80),
}


@dataclass(frozen=True, slots=True)
class Score:
    """How one model predicts the text."""

    perplexity: float
    greedy: torch.Tensor  # int64[N]: the likeliest token at each position
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Quality:
    """One kind's score beside that of the weights as they are."""

    kind: str
    tokens: int  # predicted
    perplexity: float
    perplexity_ratio: float
    same_tokens: float  # share of positions with the same likeliest token
    weight_mb: float

    @property
    def good_enough(self) -> bool:
        floor = FLOORS[self.kind]
        return (
            self.perplexity_ratio <= floor.perplexity_ratio
            and self.same_tokens >= floor.same_tokens
        )


def measure(
    path: Path, kinds: Sequence[str], tokens: int = 0, kv_cache_dtype: str = ""
) -> Iterator[Quality]:
    """The checkpoint in `path` in each kind (of FLOORS) in turn; `tokens`: of the text, 0 for all.

    `kv_cache_dtype`: of all kinds; "": as each is served. The kernels must have been chosen
    (`ops.use`).
    """
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids[: tokens or None]
    plain = score(_load(path, PLAIN), ids)
    for kind in kinds:
        model = _load(path, kind)
        served = "float16" if kind == PLAIN else cpu_kv_dtype(*_stored(kind), model.head_dim)
        found = score(model, ids, KV_DTYPES[kv_cache_dtype or served])
        yield Quality(
            kind=kind,
            tokens=len(found.greedy),
            perplexity=found.perplexity,
            perplexity_ratio=found.perplexity / plain.perplexity,
            same_tokens=float((found.greedy == plain.greedy).float().mean()),
            weight_mb=found.weight_bytes / 1e6,
        )


def _stored(kind: str) -> tuple[str, str]:
    """(quantize, precision), as `load_model` takes them."""
    return kind if kind in KINDS else "", "medium" if kind == MEDIUM else "highest"


def _load(path: Path, kind: str) -> CausalLM:
    quantize, precision = _stored(kind)
    return load_model(
        path,
        dtype="bfloat16",
        device="cpu",
        group=single_group(),
        quantize=quantize,
        precision=precision,
    )


@torch.inference_mode()
def score(model: CausalLM, ids: Sequence[int], kv_dtype: torch.dtype = torch.float32) -> Score:
    """Predicts each id but the first of each piece from those before it in the piece."""
    loss, greedy = 0.0, []
    for start in range(0, len(ids) - 1, PIECE):
        piece = torch.tensor(ids[start : start + PIECE])
        hidden, targets = _forward(model, piece, kv_dtype)[:-1], piece[1:]
        for first in range(0, len(targets), _LOGITS_ROWS):
            part = slice(first, first + _LOGITS_ROWS)
            logits = model.logits(hidden[part])
            assert logits is not None, "there is one rank"
            loss += float(torch.nn.functional.cross_entropy(logits, targets[part], reduction="sum"))
            greedy.append(logits.argmax(-1))
    found = torch.cat(greedy)
    return Score(math.exp(loss / len(found)), found, model.weight_bytes)


def _forward(model: CausalLM, ids: torch.Tensor, kv_dtype: torch.dtype) -> torch.Tensor:
    """Hidden states [T, hidden_size] of one sequence in a cache of its own."""
    layout = KVCacheLayout(
        model.num_layers, PIECE, model.num_local_kv_heads, model.head_dim, kv_dtype
    )
    size = len(ids)
    attention = AttentionMetadata(
        cu_query_lens=torch.tensor([0, size], dtype=torch.int32),
        context_lens=torch.tensor([size], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=torch.arange(size),
        max_query_len=size,
        max_context_len=size,
    )
    return model.forward(ids, torch.arange(size), KVCache(layout, 1), attention)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, help="a checkpoint directory; the embedded model")
    parser.add_argument("--kind", action="append", choices=list(FLOORS), help="all of them")
    parser.add_argument("--tokens", type=int, default=0, help="of the text; 0: all")
    parser.add_argument("--kernels", default="", choices=("", *ops.BACKENDS))
    parser.add_argument(
        "--kv-cache-dtype",
        default="",
        choices=["", *KV_DTYPES],
        help="of all kinds; default: as each is served on a CPU",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per kind")
    options = parser.parse_args()
    ops.use(options.kernels)
    good = True
    if not options.json:
        print(f"{'kind':18}{'tokens':>7}{'perplexity':>12}{'ratio':>9}{'same tokens':>13}{'MB':>8}")
    for found in measure(
        options.model or ensure_embedded_model(),
        options.kind or list(FLOORS),
        options.tokens,
        options.kv_cache_dtype,
    ):
        good = good and found.good_enough
        numbers = {name: getattr(found, name) for name in Quality.__slots__}
        print(
            json.dumps(numbers)
            if options.json
            else f"{found.kind:18}{found.tokens:7}{found.perplexity:12.3f}"
            f"{found.perplexity_ratio:9.4f}{found.same_tokens:13.2%}{found.weight_mb:8.1f}"
            f"{'' if found.good_enough else '   below the floor'}",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
