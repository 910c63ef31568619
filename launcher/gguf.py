"""Turns a .gguf file of a Llama-family model into a checkpoint directory that the shards can read.

The weights are dequantised once, to bfloat16, into the user's cache directory, beside a
config.json, generation_config.json and a tokenizer rebuilt from the file's own metadata.
It does not choose models, download files or know the shards; torch is not needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from headgate.launcher.gguf_file import (
    ARCHITECTURES,
    ROPE_FACTORS,
    GgufError,
    GgufFile,
    model_config,
    open_gguf,
)
from headgate.launcher.gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from gguf import ReaderTensor

Report = Callable[[str], None]

FORMAT = 2  # part of the cache key: raise it when what is written changes
CHUNK_ELEMENTS = 1 << 23  # dequantised at a time: 32 MB of float32

TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_directory() -> Path:
    """Where converted models go: HEADGATE_CACHE, or headgate/ in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("HEADGATE_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "headgate"
    return Path.home() / ".cache" / "headgate"


def convert_gguf(
    path: str | Path, *, identity: str | None = None, report: Report | None = None
) -> Path:
    """The checkpoint directory of a .gguf file, converted now if it was not before.

    It is found again by the file's path, size and time of change, or by `identity` where the
    caller knows a better name for the content. Processes that start together wait for the one
    that converts; a directory appears only when it is complete.

    Raises GgufError, one sentence, for a file that is missing, damaged or of an unsupported kind.
    """
    source = Path(path).resolve()
    if not source.is_file():
        raise GgufError(f"{path}: no such file")
    if identity is None:
        stat = source.stat()
        identity = f"{source}:{stat.st_size}:{stat.st_mtime_ns}"
    key = hashlib.sha256(f"{FORMAT}:{identity}".encode()).hexdigest()[:16]
    target = cache_directory() / "gguf" / f"{source.stem}-{key}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                _convert_into(source, target, report or (lambda line: None))
    except OSError as error:
        raise GgufError(
            f"cannot write the converted model to {target}: {error.strerror or error} "
            "(HEADGATE_CACHE chooses another directory)"
        ) from error
    return target


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Holds an exclusive file lock; it ends with the process, so a killed one blocks nobody."""
    with open(lock, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(source: Path, target: Path, report: Report) -> None:
    for leftover in target.parent.glob(f".{target.name}.part-*"):
        shutil.rmtree(
            leftover, ignore_errors=True
        )  # of a conversion that was killed: we hold the lock
    report(f"converting {source.name} to bfloat16, once, into {target}")
    model = open_gguf(source)
    config = model_config(model)
    tensors = _plan_tensors(model, config)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        try:
            write_tokenizer(part, model.metadata, config)
        except GgufError as error:
            raise GgufError(f"{model.name}: {error}") from error
        eos = config["eos_token_id"]
        _write_json(part / "config.json", config)
        _write_json(
            part / "generation_config.json",
            {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config},
        )
        _write_weights(part / "model.safetensors", tensors, report)
        _write_json(part / "conversion.json", {"source": source.name, "format": FORMAT, "eos": eos})
        part.chmod(0o755)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


class _PlannedTensor:
    """One tensor to write: where it comes from and in which order its rows go out."""

    def __init__(self, source: ReaderTensor, rows: np.ndarray | None) -> None:
        self.source = source
        self.shape = tuple(
            int(n) for n in reversed(source.shape)
        )  # the file has the fastest axis first
        self.rows = rows

    def chunks(self) -> Iterator[np.ndarray]:
        """The values in order, as uint16 arrays of bfloat16 bits, CHUNK_ELEMENTS at most each."""
        from gguf import dequantize

        data = self.source.data
        step = max(1, CHUNK_ELEMENTS // (self.shape[-1] if len(self.shape) > 1 else 1))
        for start in range(0, self.shape[0], step):
            index = (
                slice(start, start + step) if self.rows is None else self.rows[start : start + step]
            )
            yield to_bfloat16(dequantize(data[index], self.source.tensor_type))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16 (ties to even) as uint16; NaN stays NaN."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")


def _plan_tensors(model: GgufFile, config: dict[str, Any]) -> dict[str, _PlannedTensor]:
    """Published tensor name -> what to write; every tensor of the file is used or an error."""
    import numpy as np
    from gguf import dequantize

    interleaved = ARCHITECTURES[model.metadata["general.architecture"]][2]
    planned: dict[str, _PlannedTensor] = {}
    tried: set[Any] = set()
    for name, tensor in model.tensors.items():
        if name == ROPE_FACTORS:
            continue
        rows = None
        if interleaved and name.split(".")[-2] in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
            order = np.arange(int(tensor.shape[-1])).reshape(heads, -1, 2)
            rows = order.swapaxes(1, 2).reshape(-1)
        planned[_published_name(model.name, name, config["num_hidden_layers"])] = _PlannedTensor(
            tensor, rows
        )
        if tensor.tensor_type not in tried:
            tried.add(tensor.tensor_type)
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError as error:
                kind = tensor.tensor_type.name
                raise GgufError(
                    f"{model.name}: quantisation {kind} (of {name}) is not supported"
                ) from error
    return planned


def _published_name(file: str, name: str, num_layers: int) -> str:
    if name in TOP_TENSORS:
        return TOP_TENSORS[name]
    part = name.split(".")
    known = len(part) == 4 and part[0] == "blk" and part[2] in LAYER_TENSORS
    if known and part[1].isdigit() and int(part[1]) < num_layers:
        return f"model.layers.{part[1]}.{LAYER_TENSORS[part[2]]}.{part[3]}"
    raise GgufError(f"{file}: tensor {name!r} is not one of a Llama-family model")


def _write_weights(path: Path, tensors: dict[str, _PlannedTensor], report: Report) -> None:
    """Writes a safetensors file tensor by tensor, so that memory holds one chunk at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, tensor in tensors.items():
        size = 2
        for n in tensor.shape:
            size *= n
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [total, total + size],
        }
        total += size
    if (free := shutil.disk_usage(path.parent).free) < total + (1 << 20):
        raise GgufError(
            f"the converted model needs {total:,} bytes in {path.parent.parent}, {free:,} are free "
            "(HEADGATE_CACHE chooses another directory)"
        )
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        _write_tensors(file, tensors, total, report)
        file.flush()
        os.fsync(file.fileno())  # the rename that follows says "complete", also after a power cut


def _write_tensors(
    file: BinaryIO, tensors: dict[str, _PlannedTensor], total: int, report: Report
) -> None:
    written, said = 0, 0
    for tensor in tensors.values():
        for chunk in tensor.chunks():
            file.write(chunk.tobytes())
            written += chunk.nbytes
            if (percent := written * 100 // total) >= said + 20:
                said = percent - percent % 20
                report(f"converted {said} % of {total / 1e6:,.0f} MB")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """`python -m headgate.launcher.gguf FILE`: progress, then the directory as last line."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m headgate.launcher.gguf FILE.gguf", file=sys.stderr)
        return 2
    try:
        print(convert_gguf(arguments[0], report=lambda line: print(line, flush=True)))
    except GgufError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
