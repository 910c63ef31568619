"""Samplers: the tokens of a step's rows, on the host at once, or on the device with a copy to come.

Rank 0 chooses and all ranks get its choice, but for likeliest tokens that a replayed step has
brought to all of them (`VocabHead.choose`). Both go through the vocabulary some rows at a time, so
that the logits in memory stay few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from headgate.kernels import ops
from headgate.proto.messages import Pooling, TopTokens
from headgate.shard.distributed import Group
from headgate.shard.input_batch import InputBatch
from headgate.shard.last_tokens import LastTokens
from headgate.shard.sampling.device import rows_to_sample
from headgate.shard.sampling.grammar import Masks
from headgate.shard.sampling.logprobs import (
    NO_TOP,
    logprobs_on_device,
    read_logprobs,
    token_logprobs,
)
from headgate.shard.sampling.params import NO_TOKEN, IntArray, SampledRows
from headgate.shard.sampling.sampler import sample
from headgate.shard.scheduled_rows import Draws
from headgate.shard.staging import Staging

# Rows whose logits are in memory at once: 64 rows of 152k tokens are 39 MB. A GPU has room for
# more, and so reads the vocabulary's projection once for all of them.
LOGITS_ROWS = 64
GPU_LOGITS_ROWS = 256


@dataclass(frozen=True, slots=True)
class Logits:
    """Of `rows` of the rows that draw a token, or all that are left: `of` a place among them on."""

    of: Callable[[int], torch.Tensor | None]
    rows: int
    likeliest: IntArray | None = None  # int64[S] on all ranks; there are no logits then


@dataclass(slots=True)
class Sampled:
    """What S rows got. A row that its grammar cannot go on with has NO_TOKEN, a pooled one 0."""

    tokens: IntArray  # [S], on all ranks
    logprobs: list[float]  # of the rows that asked, else 0; on rank 0
    top: list[TopTokens] = field(default_factory=list)  # empty, or one for each row

    @classmethod
    def nothing(cls, count: int) -> Sampled:
        return cls(np.zeros(count, np.int64), [0.0] * count)

    def add_logprobs(
        self, places: IntArray, values: list[float], alternatives: list[TopTokens]
    ) -> None:
        """places: of the rows, ascending over all calls; alternatives: none, or each row's."""
        for place, value in zip(places.tolist(), values, strict=True):
            self.logprobs[place] = value
        for place, tops in zip(places.tolist(), alternatives, strict=False):
            self.top.extend([NO_TOP] * (place - len(self.top)))
            self.top.append(tops)

    def finish(self) -> Sampled:
        if self.top:
            self.top.extend([NO_TOP] * (len(self.tokens) - len(self.top)))
        return self


def _parts(batch: InputBatch, slots: IntArray, rows: int, plain: bool = False) -> list[IntArray]:
    """Places of the rows that get a token, in pieces of `rows`. `plain`: known to be plain, all of
    them."""
    drawn = np.arange(len(slots))
    if not plain and not batch.plain[slots].all():
        drawn = np.flatnonzero(batch.params["pooling"][slots] == Pooling.NONE)
    return [drawn[start : start + rows] for start in range(0, len(drawn), rows)]


def _asking(batch: InputBatch, slots: IntArray) -> tuple[IntArray, list[int]]:
    """(which of the rows want logprobs, how many alternatives each)."""
    params = batch.params[slots]
    asking = np.flatnonzero(params["logprobs"] | (params["top_n_tokens"] > 0))
    return asking, params["top_n_tokens"][asking].tolist()


class HostSampler:
    """Waits for the tokens."""

    def __init__(self, group: Group, device: str) -> None:
        """device: where the group's tensors are."""
        self._group = group
        self._device = device

    def sample(self, batch: InputBatch, draws: Draws, masks: Masks, logits: Logits) -> Sampled:
        """Of S tokens."""
        if logits.likeliest is not None:
            return Sampled(logits.likeliest, [0.0] * len(logits.likeliest))
        slots = draws.slots
        sampled, plain = Sampled.nothing(len(slots)), bool(batch.plain[slots].all())
        for index, part in enumerate(_parts(batch, slots, logits.rows, plain)):
            found = logits.of(index * logits.rows)
            if found is None:
                continue
            if plain:
                sampled.tokens[part] = ops.argmax(found)
                continue
            rows = batch.sampled_rows(draws.take(part), masks)
            tokens = sampled.tokens[part] = sample(found, rows)
            asking, top_n = _asking(batch, slots[part])
            if len(asking):
                asked = found
                if len(asking) < len(found):
                    asked = found[torch.from_numpy(asking).to(found.device)]
                sampled.add_logprobs(part[asking], *token_logprobs(asked, tokens[asking], top_n))
        if masks.failures:
            sampled.tokens[np.isin(slots, list(masks.failures))] = NO_TOKEN
        if self._group.world_size > 1 and len(slots):
            shared = torch.from_numpy(sampled.tokens).to(self._device)
            sampled.tokens = self._group.broadcast(shared).cpu().numpy()
        return sampled.finish()


class DeviceSampler:
    """Leaves the tokens on the device, where the next step finds them, and has them copied.

    For rows without watermarks, whose grammars go on.
    """

    def __init__(self, group: Group, staging: Staging, last_tokens: LastTokens) -> None:
        self._group = group
        self._staging = staging
        self._last_tokens = last_tokens
        sample_tokens = ops.optional("sample_tokens")
        assert sample_tokens is not None, "this back end samples on the host"
        self._sample_tokens: Callable[..., torch.Tensor] = sample_tokens

    def sample(
        self, batch: InputBatch, draws: Draws, masks: Masks, logits: Logits
    ) -> tuple[Callable[[], object], Callable[[], Sampled]]:
        """(waits for the copy, on any thread; also reads it). No synchronisation here."""
        slots = draws.slots
        parts, logprobs = _parts(batch, slots, logits.rows), []
        pieces: list[torch.Tensor] = []
        for index, part in enumerate(parts):
            found = logits.of(index * logits.rows)
            if found is None:
                continue
            pieces.append(self._tokens(found, batch.sampled_rows(draws.take(part), masks)))
            asking, top_n = _asking(batch, slots[part])
            if len(asking):
                values = self._logprobs(found, pieces[-1], asking, max(top_n))
                logprobs.append((part[asking], top_n, values))
        tokens = self._joined(pieces, parts, len(slots))
        if self._group.world_size > 1 and len(slots):
            tokens = self._group.broadcast(tokens)
        self._last_tokens.keep(tokens)
        fetch = self._staging.download([tokens, *(x for *_, found in logprobs for x in found)])

        def sampled() -> Sampled:
            fetched, *rest = fetch()
            result = Sampled(fetched.copy(), [0.0] * len(slots))
            for index, (places, top_n, _) in enumerate(logprobs):
                result.add_logprobs(places, *read_logprobs(rest[3 * index :][:3], top_n))
            return result.finish()

        return fetch, sampled

    def _tokens(self, logits: torch.Tensor, rows: SampledRows) -> torch.Tensor:
        described = rows_to_sample(rows, logits.shape[1], self._staging.upload)
        penalised = described.penalised
        if penalised is not None:
            known = self._last_tokens.resolve(penalised.token_ids)
            described = replace(described, penalised=replace(penalised, token_ids=known))
        return self._sample_tokens(logits, described)

    def _logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, asking: IntArray, most: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if len(asking) < len(logits):
            (rows,) = self._staging.upload([asking])
            logits, tokens = logits.index_select(0, rows), tokens.index_select(0, rows)
        return logprobs_on_device(logits, tokens, most)

    def _joined(
        self, pieces: list[torch.Tensor], parts: list[IntArray], count: int
    ) -> torch.Tensor:
        """int64[count]: the pieces' tokens at their places; pooled rows, and ranks that choose
        nothing, have 0."""
        drawn = sum(map(len, parts))
        if len(pieces) == 1 and drawn == count:
            return pieces[0]
        places, tokens = self._staging.upload(
            [np.concatenate([np.zeros(0, np.int64), *parts]), np.zeros(count, np.int64)]
        )
        if pieces:
            tokens.index_copy_(0, places, torch.cat(pieces))
        return tokens
