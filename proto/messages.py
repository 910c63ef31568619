"""The messages of a step as frozen dataclasses, and their wire form.

Router and shards compute with these; `headgate.proto.shard_pb2` is only how they
travel. Lists of numbers travel packed (little-endian, 4 bytes each), because
protobuf decodes repeated fields element by element in Python.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

from headgate.proto import shard_pb2

_SWAP = sys.byteorder == "big"


class RowEnd(IntEnum):
    """Why a shard ended a row by itself."""

    NONE = 0
    LENGTH = 1
    EOS = 2
    STOP_TOKEN = 3
    FAILED = 4  # no token could be chosen
    POOLED = 5  # no token was asked for: the prompt is pooled


class Pooling(IntEnum):
    """What a row gives instead of tokens: its prompt's final hidden states, pooled."""

    NONE = 0
    MEAN = 1  # over all prompt tokens
    LAST = 2  # of the last one


ROW_ENDS = tuple(RowEnd)  # a look-up costs a tenth of a call of the class


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How a shard chooses a row's tokens and when it ends the row. By default greedy."""

    max_new_tokens: int  # including those generated before a preemption
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    sample_index: int = 0
    watermark_gamma: float = 0.0  # share of the vocabulary that is favoured; 0: no watermark
    watermark_delta: float = 0.0  # added to its logits
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    prompt_top_n_tokens: int = 0
    pooling: Pooling = Pooling.NONE  # else no token is sampled, and max_new_tokens is 1
    grammar: str = ""  # llguidance's form of what the output must be; "": anything
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # no other tokens; (): all
    bad_words: tuple[tuple[int, ...], ...] = ()  # tokens that may not follow each other


@dataclass(frozen=True, slots=True)
class NewRow:
    """A row the shard does not hold, in full."""

    id: int
    prompt_ids: Sequence[int]
    sampling: RowSampling
    output_ids: Sequence[int] = ()
    num_computed_tokens: int = 0  # tokens whose KV is there already
    block_ids: Sequence[int] = ()
    lockstep: bool = False
    adapter_id: str = ""


@dataclass(frozen=True, slots=True)
class Fork:
    """A new row that begins with another's tokens. The KV of all but its last is there already."""

    parent: int
    child: int
    sample_index: int
    block_ids: Sequence[int]
    num_tokens: int  # of the parent's that are shared
    token_ids: Sequence[int] = ()  # those that follow them


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One iteration: what changed since the last plan, and how many tokens each row computes."""

    epoch: int
    sequence: int
    rows: Sequence[int] = ()  # row ids to compute, in batch order
    counts: Sequence[int] = ()  # tokens to compute of each
    drafts: Sequence[int] = ()  # guessed tokens that each may be computed with too; empty: none
    most_drafts: int = 0  # of all rows together, the first in order first
    new_rows: Sequence[NewRow] = ()
    removed: Sequence[int] = ()
    block_rows: Sequence[int] = ()  # row id of each new block ...
    block_ids: Sequence[int] = ()  # ... and the block
    copies: Sequence[tuple[int, int]] = ()  # (from block, to block)
    forks: Sequence[Fork] = ()
    choices: Sequence[tuple[int, int]] = ()  # (row id, the token in place of its last)
    reset: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The most likely tokens at one place, best first."""

    ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of consecutive prompt tokens of one row, from position `start` (>= 1)."""

    row: int
    start: int
    logprobs: Sequence[float]
    top: Sequence[TopTokens] = ()  # one per token, or empty


@dataclass(frozen=True, slots=True)
class PooledStates:
    """What a step adds to a pooled row: the sum of its hidden states at [start, stop)."""

    row: int
    start: int
    stop: int
    sums: Sequence[float]  # hidden_size of them, in double precision


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced: a token of each scheduled row that reached the end of what is known,
    and one more for every guessed token that the row would have sampled."""

    epoch: int
    sequence: int
    rows: Sequence[int] = ()  # a row with several tokens comes several times
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()  # one per row
    ends: Sequence[RowEnd] = ()  # one per row
    top: Sequence[TopTokens] = ()  # one per row, or empty when no row asked
    prompt_logprobs: Sequence[PromptLogprobs] = ()
    refused: str = ""  # why the group refused the plan; empty: it ran
    forward_ns: int = 0
    total_ns: int = 0
    pooled: Sequence[PooledStates] = ()
    failures: Mapping[int, str] = field(default_factory=dict)  # by row id: why it ended FAILED
    num_drafts: int = 0  # guessed tokens that were computed


# ------------------------------------------------------------------ packing


def pack_ids(ids: Iterable[int]) -> bytes:
    """Little-endian uint32s. Raises OverflowError for numbers that do not fit."""
    return _to_bytes(array("I", ids))


def unpack_ids(data: bytes) -> list[int]:
    return _from_bytes("I", data).tolist() if data else []


def pack_floats(values: Iterable[float]) -> bytes:
    """Little-endian float32s."""
    return _to_bytes(array("f", values))


def unpack_floats(data: bytes) -> list[float]:
    return _from_bytes("f", data).tolist()


def _to_bytes(values: array) -> bytes:
    if _SWAP:
        values.byteswap()
    return values.tobytes()


def _from_bytes(code: str, data: bytes) -> array:
    values = array(code)
    values.frombytes(data)
    if _SWAP:
        values.byteswap()
    return values


# ------------------------------------------------------------------ plans

_PACKED_SAMPLING = ("logit_bias", "allowed_token_ids", "bad_words")
_SAMPLING_FIELDS = tuple(
    name for name in RowSampling.__dataclass_fields__ if name not in _PACKED_SAMPLING
)


# Most plans have rows, their counts and at times new blocks, most results tokens: what a message
# does not have is not touched, here and below. At each step all of this code is cold.


def encode_plan(plan: StepPlan) -> shard_pb2.StepPlan:
    message = shard_pb2.StepPlan(
        epoch=plan.epoch,
        sequence=plan.sequence,
        rows=pack_ids(plan.rows),
        counts=pack_ids(plan.counts),
    )
    if plan.drafts:
        message.drafts = pack_ids(plan.drafts)
        message.most_drafts = plan.most_drafts
    if plan.block_rows or plan.block_ids:
        message.block_rows = pack_ids(plan.block_rows)
        message.block_ids = pack_ids(plan.block_ids)
    if plan.removed:
        message.removed = pack_ids(plan.removed)
    if plan.new_rows:
        message.new_rows.extend(_encode_row(row) for row in plan.new_rows)
    if plan.forks:
        message.forks.extend(_encode_fork(fork) for fork in plan.forks)
    if plan.copies:
        message.copy_from = pack_ids(source for source, _ in plan.copies)
        message.copy_to = pack_ids(target for _, target in plan.copies)
    if plan.choices:
        message.chosen_rows = pack_ids(row for row, _ in plan.choices)
        message.chosen_ids = pack_ids(token for _, token in plan.choices)
    if plan.reset:
        message.reset = True
    return message


def decode_plan(message: shard_pb2.StepPlan) -> StepPlan:
    epoch, sequence = message.epoch, message.sequence
    rows, counts = unpack_ids(message.rows), unpack_ids(message.counts)
    drafts = unpack_ids(message.drafts)
    block_rows, block_ids = unpack_ids(message.block_rows), unpack_ids(message.block_ids)
    changed = (
        message.removed
        or message.reset
        or message.new_rows
        or message.forks
        or message.copy_from
        or message.copy_to
        or message.chosen_rows
        or message.chosen_ids
    )
    if not changed:
        return StepPlan(
            epoch,
            sequence,
            rows,
            counts,
            drafts,
            message.most_drafts,
            block_rows=block_rows,
            block_ids=block_ids,
        )
    return StepPlan(
        epoch=epoch,
        sequence=sequence,
        rows=rows,
        counts=counts,
        drafts=drafts,
        most_drafts=message.most_drafts,
        new_rows=[_decode_row(row) for row in message.new_rows],
        removed=unpack_ids(message.removed),
        block_rows=block_rows,
        block_ids=block_ids,
        copies=list(zip(unpack_ids(message.copy_from), unpack_ids(message.copy_to), strict=True)),
        forks=[_decode_fork(fork) for fork in message.forks],
        choices=list(
            zip(unpack_ids(message.chosen_rows), unpack_ids(message.chosen_ids), strict=True)
        ),
        reset=message.reset,
    )


def _encode_fork(fork: Fork) -> shard_pb2.Fork:
    return shard_pb2.Fork(
        parent=fork.parent,
        child=fork.child,
        sample_index=fork.sample_index,
        block_ids=pack_ids(fork.block_ids),
        num_tokens=fork.num_tokens,
        token_ids=pack_ids(fork.token_ids),
    )


def _decode_fork(message: shard_pb2.Fork) -> Fork:
    return Fork(
        message.parent,
        message.child,
        message.sample_index,
        unpack_ids(message.block_ids),
        message.num_tokens,
        unpack_ids(message.token_ids),
    )


def _encode_row(row: NewRow) -> shard_pb2.NewRow:
    sampling = {name: getattr(row.sampling, name) for name in _SAMPLING_FIELDS}
    return shard_pb2.NewRow(
        id=row.id,
        prompt_ids=pack_ids(row.prompt_ids),
        output_ids=pack_ids(row.output_ids),
        num_computed_tokens=row.num_computed_tokens,
        block_ids=pack_ids(row.block_ids),
        sampling=shard_pb2.SamplingParams(
            **sampling,
            bias_ids=pack_ids(id_ for id_, _ in row.sampling.logit_bias),
            bias_values=pack_floats(value for _, value in row.sampling.logit_bias),
            allowed_token_ids=pack_ids(row.sampling.allowed_token_ids),
            bad_word_ids=pack_ids(id_ for word in row.sampling.bad_words for id_ in word),
            bad_word_counts=pack_ids(len(word) for word in row.sampling.bad_words),
        ),
        lockstep=row.lockstep,
        adapter_id=row.adapter_id,
    )


def _decode_row(message: shard_pb2.NewRow) -> NewRow:
    sampling = {name: getattr(message.sampling, name) for name in _SAMPLING_FIELDS}
    sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    sampling["pooling"] = Pooling(sampling["pooling"])
    ids, values = message.sampling.bias_ids, message.sampling.bias_values
    sampling["logit_bias"] = tuple(zip(unpack_ids(ids), unpack_floats(values), strict=True))
    sampling["allowed_token_ids"] = tuple(unpack_ids(message.sampling.allowed_token_ids))
    word_ids = iter(unpack_ids(message.sampling.bad_word_ids))
    counts = unpack_ids(message.sampling.bad_word_counts)
    sampling["bad_words"] = tuple(tuple(islice(word_ids, count)) for count in counts)
    return NewRow(
        id=message.id,
        prompt_ids=unpack_ids(message.prompt_ids),
        sampling=RowSampling(**sampling),
        output_ids=unpack_ids(message.output_ids),
        num_computed_tokens=message.num_computed_tokens,
        block_ids=unpack_ids(message.block_ids),
        lockstep=message.lockstep,
        adapter_id=message.adapter_id,
    )


# ------------------------------------------------------------------ results


@dataclass(slots=True)
class _PackedTop:
    """Alternatives of several places, one after another."""

    counts: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, places: Sequence[TopTokens]) -> _PackedTop:
        packed = cls()
        for place in places:
            packed.counts.append(len(place.ids))
            packed.ids.extend(place.ids)
            packed.logprobs.extend(place.logprobs)
        return packed


def _unpack_top(counts: bytes, ids: bytes, logprobs: bytes) -> list[TopTokens]:
    all_ids, all_logprobs = unpack_ids(ids), unpack_floats(logprobs)
    places, start = [], 0
    for count in unpack_ids(counts):
        places.append(
            TopTokens(all_ids[start : start + count], all_logprobs[start : start + count])
        )
        start += count
    return places


def encode_result(result: StepResult) -> shard_pb2.StepResult:
    message = shard_pb2.StepResult(
        epoch=result.epoch,
        sequence=result.sequence,
        rows=pack_ids(result.rows),
        token_ids=pack_ids(result.token_ids),
        logprobs=pack_floats(result.logprobs),
        ends=bytes(result.ends),
        forward_ns=result.forward_ns,
        total_ns=result.total_ns,
        num_drafts=result.num_drafts,
    )
    if result.refused:
        message.refused = result.refused
    if result.top:
        top = _PackedTop.of(result.top)
        message.top_counts = pack_ids(top.counts)
        message.top_ids = pack_ids(top.ids)
        message.top_logprobs = pack_floats(top.logprobs)
    if result.prompt_logprobs:
        message.prompt_logprobs.extend(map(_encode_prompt_logprobs, result.prompt_logprobs))
    if result.pooled:
        message.pooled.extend(map(_encode_pooled, result.pooled))
    if result.failures:
        message.failures.update(result.failures)
    return message


def decode_result(message: shard_pb2.StepResult) -> StepResult:
    epoch, sequence = message.epoch, message.sequence
    rows, token_ids = unpack_ids(message.rows), unpack_ids(message.token_ids)
    logprobs = unpack_floats(message.logprobs)
    ends = [ROW_ENDS[end] for end in message.ends]
    forward_ns, total_ns = message.forward_ns, message.total_ns
    more = (
        message.refused
        or message.top_counts
        or message.prompt_logprobs
        or message.pooled
        or message.failures
    )
    if not more:
        return StepResult(
            epoch,
            sequence,
            rows,
            token_ids,
            logprobs,
            ends,
            forward_ns=forward_ns,
            total_ns=total_ns,
            num_drafts=message.num_drafts,
        )
    return StepResult(
        epoch=epoch,
        sequence=sequence,
        rows=rows,
        token_ids=token_ids,
        logprobs=logprobs,
        ends=ends,
        top=_unpack_top(message.top_counts, message.top_ids, message.top_logprobs),
        prompt_logprobs=[_decode_prompt_logprobs(entry) for entry in message.prompt_logprobs],
        refused=message.refused,
        forward_ns=forward_ns,
        total_ns=total_ns,
        pooled=[_decode_pooled(entry) for entry in message.pooled],
        failures=dict(message.failures),
        num_drafts=message.num_drafts,
    )


def _encode_pooled(entry: PooledStates) -> shard_pb2.PooledStates:
    return shard_pb2.PooledStates(
        row=entry.row,
        start=entry.start,
        stop=entry.stop,
        sums=_to_bytes(array("d", entry.sums)),
    )


def _decode_pooled(message: shard_pb2.PooledStates) -> PooledStates:
    sums = _from_bytes("d", message.sums).tolist()
    return PooledStates(message.row, message.start, message.stop, sums)


def _encode_prompt_logprobs(entry: PromptLogprobs) -> shard_pb2.PromptLogprobs:
    top = _PackedTop.of(entry.top)
    return shard_pb2.PromptLogprobs(
        row=entry.row,
        start=entry.start,
        logprobs=pack_floats(entry.logprobs),
        top_counts=pack_ids(top.counts),
        top_ids=pack_ids(top.ids),
        top_logprobs=pack_floats(top.logprobs),
    )


def _decode_prompt_logprobs(message: shard_pb2.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(
        row=message.row,
        start=message.start,
        logprobs=unpack_floats(message.logprobs),
        top=_unpack_top(message.top_counts, message.top_ids, message.top_logprobs),
    )
