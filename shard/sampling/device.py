"""From SampledRows, which live on the host, to the columns that sampling on the device reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headgate.kernels.sampled_rows import BiasedTokens, MaskedRows, PenalisedRows, RowsToSample
from headgate.shard.sampling.params import SampledRows

AnyArray = npt.NDArray[Any]
# Arrays to tensors on the device: int64, int32, float32.
Upload = Callable[[Sequence[AnyArray]], Sequence[torch.Tensor]]


def upload_to(device: torch.device | str) -> Upload:
    """One by one, from memory that is not pinned."""
    return lambda arrays: [torch.from_numpy(array).to(device) for array in arrays]


def rows_to_sample(rows: SampledRows, vocab_size: int, upload: Upload) -> RowsToSample:
    """The rows' parameters on the device, but for watermarks; `upload` is called once."""
    params, biased, penalised = rows.params, _biased(rows), _penalised(rows)
    columns = {
        "temperature": _copy(params["temperature"]),
        "top_k": np.minimum(params["top_k"], vocab_size).astype(np.int32),
        "top_p": _copy(params["top_p"]),
        "typical_p": _copy(params["typical_p"]),
        "min_p": _copy(params["min_p"]),
        "seed": _copy(params["seed"]).view(np.int64),
        "position": rows.output_positions.astype(np.int32),
        "sample_index": params["sample_index"].astype(np.int32),
    }
    parts = (columns, biased, penalised, _masked(rows, vocab_size))
    tensors = iter(upload([array for part in parts for array in part.values()]))
    own, biases, penalties, masks = ({name: next(tensors) for name in part} for part in parts)
    return RowsToSample(
        **own,
        biased=BiasedTokens(**biases) if biases else None,
        penalised=_penalties(penalties, penalised["starts"]) if penalties else None,
        masked=MaskedRows(**masks) if masks else None,
    )


def _penalties(tensors: dict[str, torch.Tensor], starts: AnyArray) -> PenalisedRows:
    return PenalisedRows(**tensors, longest=int(np.diff(starts).max()))


def allowed_tokens(rows: SampledRows, index: int) -> npt.NDArray[np.bool_]:
    """Mask of the tokens that are left to the row, without banned ones if there are others."""
    allowed = rows.allowed[index]
    if index in rows.banned:
        others = allowed.copy()
        others[rows.banned[index]] = False
        if others.any():
            return others
    return allowed


def _biased(rows: SampledRows) -> dict[str, AnyArray]:
    """BiasedTokens, or nothing."""
    counts = [len(bias.ids) for bias in rows.biases.values()]
    if not sum(counts):
        return {}
    biases = rows.biases.values()
    return {
        "rows": np.repeat(np.array([*rows.biases], np.int64), counts),
        "token_ids": np.concatenate([bias.ids for bias in biases]),
        "values": np.concatenate([bias.values for bias in biases]),
    }


def _penalised(rows: SampledRows) -> dict[str, AnyArray]:
    """PenalisedRows but for `longest`, or nothing."""
    indices = [index for index in rows.histories if not rows.params["watermark_gamma"][index]]
    if not indices:
        return {}
    histories = [rows.histories[index] for index in indices]
    params = rows.params[indices]
    return {
        "rows": np.array(indices, np.int32),
        "repetition": _copy(params["repetition_penalty"]),
        "frequency": _copy(params["frequency_penalty"]),
        "presence": _copy(params["presence_penalty"]),
        "token_ids": np.concatenate([history.token_ids for history in histories]).astype(np.int32),
        "starts": np.cumsum([0, *(len(h.token_ids) for h in histories)]).astype(np.int32),
        "num_prompt": np.array([history.num_prompt for history in histories], np.int32),
    }


def _masked(rows: SampledRows, vocab_size: int) -> dict[str, AnyArray]:
    """MaskedRows: grammars, and bans of rows without one, as bits; or nothing."""
    indices = sorted({*rows.allowed, *rows.banned})
    if not indices:
        return {}
    allowed = np.zeros((len(indices), -(-vocab_size // 32) * 32), np.bool_)
    for place, index in enumerate(indices):
        if index in rows.allowed:
            allowed[place, :vocab_size] = allowed_tokens(rows, index)
        else:
            allowed[place, :vocab_size] = True
            allowed[place, rows.banned[index]] = False
    bits = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    return {"rows": np.array(indices, np.int32), "bits": bits}


def _copy(column: AnyArray) -> AnyArray:
    """A column of records lies in strides that PyTorch does not take."""
    return column.copy()
