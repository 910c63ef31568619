"""From SampledRows, which live on the host, to the columns that sampling on the device reads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from headgate.kernels.sampled_rows import BiasedTokens, MaskedRows, PenalisedRows, RowsToSample
from headgate.shard.sampling.params import SampledRows


def rows_to_sample(rows: SampledRows, vocab_size: int, device: torch.device | str) -> RowsToSample:
    """The rows' parameters on `device`, but for watermarks."""
    params = rows.params
    return RowsToSample(
        temperature=_tensor(params["temperature"], device),
        top_k=_tensor(np.minimum(params["top_k"], vocab_size).astype(np.int32), device),
        top_p=_tensor(params["top_p"], device),
        typical_p=_tensor(params["typical_p"], device),
        min_p=_tensor(params["min_p"], device),
        seed=_tensor(params["seed"].view(np.int64), device),
        position=_tensor(rows.output_positions.astype(np.int32), device),
        sample_index=_tensor(params["sample_index"].astype(np.int32), device),
        biased=_biased(rows, device),
        penalised=_penalised(rows, device),
        masked=_masked(rows, vocab_size, device),
    )


def allowed_tokens(rows: SampledRows, index: int) -> npt.NDArray[np.bool_]:
    """Mask of the tokens that are left to the row, without banned ones if there are others."""
    allowed = rows.allowed[index]
    if index in rows.banned:
        others = allowed.copy()
        others[rows.banned[index]] = False
        if others.any():
            return others
    return allowed


def _biased(rows: SampledRows, device: torch.device | str) -> BiasedTokens | None:
    counts = [len(bias.ids) for bias in rows.biases.values()]
    if not sum(counts):
        return None
    biases = rows.biases.values()
    return BiasedTokens(
        rows=_tensor(np.repeat(np.array([*rows.biases], np.int64), counts), device),
        token_ids=_tensor(np.concatenate([bias.ids for bias in biases]), device),
        values=_tensor(np.concatenate([bias.values for bias in biases]), device),
    )


def _penalised(rows: SampledRows, device: torch.device | str) -> PenalisedRows | None:
    indices = [index for index in rows.histories if not rows.params["watermark_gamma"][index]]
    if not indices:
        return None
    histories = [rows.histories[index] for index in indices]
    lengths = [len(history.token_ids) for history in histories]
    params = rows.params[indices]
    token_ids = np.concatenate([history.token_ids for history in histories])
    return PenalisedRows(
        rows=_tensor(np.array(indices, np.int32), device),
        repetition=_tensor(params["repetition_penalty"], device),
        frequency=_tensor(params["frequency_penalty"], device),
        presence=_tensor(params["presence_penalty"], device),
        token_ids=_tensor(token_ids.astype(np.int32), device),
        starts=_tensor(np.cumsum([0, *lengths]).astype(np.int32), device),
        num_prompt=_tensor(np.array([h.num_prompt for h in histories], np.int32), device),
        longest=max(lengths),
    )


def _masked(rows: SampledRows, vocab_size: int, device: torch.device | str) -> MaskedRows | None:
    """Grammars, and bans of rows without one, as bits."""
    indices = sorted({*rows.allowed, *rows.banned})
    if not indices:
        return None
    allowed = np.zeros((len(indices), -(-vocab_size // 32) * 32), np.bool_)
    for place, index in enumerate(indices):
        if index in rows.allowed:
            allowed[place, :vocab_size] = allowed_tokens(rows, index)
        else:
            allowed[place, :vocab_size] = True
            allowed[place, rows.banned[index]] = False
    bits = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    return MaskedRows(rows=_tensor(np.array(indices, np.int32), device), bits=_tensor(bits, device))


def _tensor(values: npt.NDArray[np.generic], device: torch.device | str) -> torch.Tensor:
    # A copy: a column of records lies in strides that PyTorch does not take.
    return torch.from_numpy(values.copy()).to(device, non_blocking=True)
