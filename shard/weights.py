"""Weights: reads a safetensors checkpoint by intent, and of each tensor only this rank's slice.

Layers say what a tensor is (a column-parallel matrix, packed or in parts; a row-parallel one; ...)
and get their piece in the dtype to compute with. Missing tensors, wrong shapes, damaged files and,
at the end, tensors nobody asked for are ModelErrors that name them. Knows no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from headgate.kernels import ops
from headgate.quant_kinds import rounds_inputs
from headgate.shard.errors import ModelError

_INDEX = "model.safetensors.index.json"
# Buffers that old versions of Transformers saved, and that every loader computes by itself.
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_NAMES_SHOWN = 5
# Bytes read of mapped files before they are opened anew: pages that were read count as memory used.
_MOST_MAPPED = 64 << 20

Matrix = Any  # a tensor or a back end's packed form of one; for ops.linear only


@dataclass(frozen=True, slots=True)
class Fused:
    """Column-parallel tensors that are multiplied as one: q, k and v, or gate and up.

    A checkpoint has either one tensor a part or one tensor `whole` that holds them in this order.
    """

    parts: tuple[str, ...]  # names, below the layer's prefix
    whole: str
    sizes: tuple[int, ...]  # rows of each part in the model
    cuts: tuple[tuple[int, range], ...]  # this rank's: (of which part, rows of it), in this order


class Weights:
    """An open checkpoint. `dtype` is how values are stored: they are rounded to it.

    On a CPU arithmetic is float32 (`compute_dtype`). Matrices are handed out in the form that the
    back end in use wants for `ops.linear`: the C++ kernels keep them in `dtype`, packed; torch
    would widen them again at every call, so for it they are float32 copies, made once, here. So the
    back end must be chosen (`ops.use`) before. `nbytes` counts the memory of all handed out.

    `quantize`: the kind (of headgate.kernels.quantised) that matrices are quantised to, each rank's
    slice with scales of its own; embeddings, norms and biases are not. "": not at all. With int4
    the vocabulary's projection is int8: four bits there cost more than in all layers together.
    `precision`: "medium" rounds the inputs of products to bfloat16, with such weights on a CPU.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype,
        device: str | torch.device,
        quantize: str = "",
        precision: str = "highest",
    ) -> None:
        self.dtype = dtype
        self.quantize = quantize
        self.precision = precision
        self.device = torch.device(device)
        self.compute_dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.nbytes = 0
        self._path = Path(path)
        self._open: dict[Path, Any] = {}
        self._mapped = 0  # bytes read since files were opened
        self._files = self._find_tensors()
        self._unused = {name for name in self._files if not _COMPUTED.search(name)}

    @property
    def rounds_inputs(self) -> bool:
        """Whether products take their inputs in fewer bits than `compute_dtype` has."""
        return rounds_inputs(self.quantize, self.precision)

    # ------------------------------------------------------------------ intents

    def replicated(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The whole tensor, to compute with: norms, biases of row-parallel layers."""
        return self._count(self._read(name, shape, lambda view: view[:]).to(self.compute_dtype))

    def table(self, name: str, shape: Sequence[int], rows: range) -> torch.Tensor:
        """Rows to look up, in the stored dtype: an embedding."""
        return self._count(self._read_rows(name, shape, [rows]))

    def head(self, name: str, shape: Sequence[int], rows: range) -> Matrix:
        """Part of the vocabulary's projection: a matrix's first dimension."""
        return self._count(self._pack_head(self._read_rows(name, shape, [rows])))

    def columns(self, name: str, shape: Sequence[int], columns: range) -> Matrix:
        """Part of a matrix's second dimension: a row-parallel layer."""
        cut = slice(columns.start, columns.stop)
        return self._count(self._pack(self._read(name, shape, lambda view: view[:, cut])))

    def tied(self, table: torch.Tensor) -> Matrix:
        """An embedding's `table` as the vocabulary's projection too; the same tensor where the back
        end takes that."""
        matrix = self._pack_head(table)
        return matrix if matrix is table else self._count(matrix)

    def shortlist(self, table: torch.Tensor, projection: Matrix) -> Any | None:
        """What finds the likeliest tokens by `projection`, made of `table`, faster; or None."""
        found = ops.make_shortlist(table, projection)
        return None if found is None else self._count(found)

    def fused_rows(self, prefix: str, fused: Fused, width: int) -> Matrix:
        """This rank's rows, one cut below the other, `width` wide; `prefix`: the layer's name."""
        return self._count(self._pack(self._read_fused(prefix, fused, "weight", (width,))))

    def fused_bias(self, prefix: str, fused: Fused) -> torch.Tensor:
        """The biases that belong to `fused_rows`."""
        return self._count(self._read_fused(prefix, fused, "bias", ()).to(self.compute_dtype))

    def has(self, name: str) -> bool:
        return self._resolve(name) is not None

    def ignore(self, name: str) -> None:
        """Says that `name` may be in the checkpoint and is not wanted."""
        self._unused.discard(self._resolve(name) or name)

    def finish(self) -> None:
        """Closes the files. Raises ModelError when tensors are left that no layer asked for."""
        self._open.clear()
        if self._unused:
            raise ModelError(
                f"{self._path} holds {len(self._unused)} tensors that the model has no place for: "
                f"{_listed(sorted(self._unused))}"
            )

    # ------------------------------------------------------------------ reading

    def _read_fused(
        self, prefix: str, fused: Fused, suffix: str, tail: tuple[int, ...]
    ) -> torch.Tensor:
        whole = f"{prefix}.{fused.whole}.{suffix}"
        if self.has(whole):
            starts = [sum(fused.sizes[:part]) for part in range(len(fused.sizes))]
            cuts = [
                range(starts[part] + cut.start, starts[part] + cut.stop) for part, cut in fused.cuts
            ]
            return self._read_rows(whole, (sum(fused.sizes), *tail), cuts)
        pieces = [
            self._read_rows(
                f"{prefix}.{fused.parts[part]}.{suffix}", (fused.sizes[part], *tail), [cut]
            )
            for part, cut in fused.cuts
        ]
        return torch.cat(pieces)

    def _read_rows(self, name: str, shape: Sequence[int], cuts: Sequence[range]) -> torch.Tensor:
        def read(view: Any) -> torch.Tensor:
            pieces = [view[cut.start : cut.stop] for cut in cuts]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        return self._read(name, shape, read)

    def _read(
        self, name: str, shape: Sequence[int], read: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        found = self._resolve(name)
        if found is None:
            raise ModelError(f"{self._path} lacks the tensor {name}")
        path = self._files[found]
        try:
            view = self._handle(path).get_slice(found)
            if tuple(view.get_shape()) != tuple(shape):
                raise ModelError(
                    f"{path}: tensor {found} has shape {list(view.get_shape())}, but config.json "
                    f"asks for {list(shape)}"
                )
            tensor = read(view)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: tensor {found} cannot be read: {error}") from error
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(
                f"{path}: tensor {found} is {str(tensor.dtype).removeprefix('torch.')}, and "
                "quantised checkpoints are not supported"
            )
        self._unused.discard(found)
        # A copy always: slices are views of the mapped file, which must not be held open by them.
        kept = tensor.to(self.device, self.dtype, copy=True).contiguous()
        self._mapped += tensor.nbytes
        if self._mapped > _MOST_MAPPED:
            self._mapped = 0
            self._open.clear()
        return kept

    def _pack(self, tensor: torch.Tensor, quantize: str | None = None) -> Matrix:
        kind = self.quantize if quantize is None else quantize
        return ops.pack_linear(tensor, self.dtype, kind, self.precision)

    def _pack_head(self, tensor: torch.Tensor) -> Matrix:
        return self._pack(tensor, "int8" if self.quantize == "int4" else self.quantize)

    def _count(self, kept: Matrix) -> Matrix:
        self.nbytes += kept.nbytes
        return kept

    def _resolve(self, name: str) -> str | None:
        """The name it has in the checkpoint: base models are saved without the prefix "model."."""
        for candidate in (name, name.removeprefix("model."), f"model.{name}"):
            if candidate in self._files:
                return candidate
        return None

    # ------------------------------------------------------------------ files

    def _find_tensors(self) -> dict[str, Path]:
        """Which file each tensor is in."""
        index = self._path / _INDEX
        if index.exists():
            paths: Iterable[Path] = self._indexed_files(index)
        else:
            paths = sorted(self._path.glob("*.safetensors"))
        files: dict[str, Path] = {}
        for path in paths:
            for name in self._handle(path).keys():  # noqa: SIM118 (not a dict)
                if name in files:
                    raise ModelError(f"tensor {name} is in both {files[name]} and {path.name}")
                files[name] = path
        if not files:
            raise ModelError(f"{self._path} holds no weights in safetensors files")
        return files

    def _indexed_files(self, index: Path) -> list[Path]:
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not an index of safetensors files: {error}") from error
        absent = sorted(name for name in names if not (self._path / name).exists())
        if absent:
            raise ModelError(f"{index} names files that are not there: {_listed(absent)}")
        return [self._path / name for name in sorted(names)]

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} is truncated or not a safetensors file: {error}"
                ) from error
        return self._open[path]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
