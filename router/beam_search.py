"""Beam search over one prompt: which beams go on with which tokens, and what is finished.

The algorithm of Transformers' `generate(num_beams=...)`, its rules for stopping included: a beam's
score is the sum of its tokens' logprobs; a finished one's is divided by length ** length_penalty
(after Wu et al., "Google's Neural Machine Translation System", 2016, section 7).
Pure: it knows no rows, no KV and no steps. Equal scores go to the better beam, then to the
lower token id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from heapq import nsmallest

from headgate.proto.messages import RowEnd, RowSampling, TopTokens


class EarlyStopping(IntEnum):
    """When to give up on beams that still run, once `width` hypotheses are finished."""

    HEURISTIC = (
        0  # when the best running beam, ended now, would be no better than the worst of them
    )
    FIRST = 1  # at once
    NEVER = 2  # when the best running beam could not become better at its best possible length


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How to search. Lengths in tokens of the answer."""

    width: int
    max_new_tokens: int
    min_new_tokens: int = 0
    length_penalty: float = 1.0  # above 0 favours long answers, below 0 short ones
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    eos_ids: frozenset[int] = frozenset()  # the tokens that end an answer ...
    stop_ids: frozenset[int] = frozenset()  # ... as EOS, or as stop tokens

    @property
    def num_ends(self) -> int:
        return len(self.eos_ids | self.stop_ids)

    @property
    def num_candidates(self) -> int:
        """Best tokens of each beam that a round looks at: enough for `width` that do not end."""
        return self.width * max(2, 1 + self.num_ends) + (
            self.num_ends if self.min_new_tokens else 0
        )

    def row_sampling(self, sampling: RowSampling) -> RowSampling:
        """For a row that carries a beam: it does not end by itself, and tells its best tokens."""
        return replace(
            sampling,
            min_new_tokens=0,
            ignore_eos=True,
            stop_token_ids=(),
            logprobs=False,
            top_n_tokens=self.num_candidates,
        )


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer that ended, its last token included."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    end: RowEnd


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam of the next round: a beam of this one, by its rank, and one token more."""

    parent: int
    token_id: int


@dataclass(frozen=True, slots=True)
class _Beam:
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0  # sum of logprobs


@dataclass(slots=True)
class BeamSearch:
    """One prompt's search. It begins with one beam, the empty answer."""

    params: BeamParams
    finished: list[Hypothesis] = field(default_factory=list)  # the `width` best, best first
    done: bool = False
    _beams: list[_Beam] = field(default_factory=lambda: [_Beam()])  # running, best first

    @property
    def num_beams(self) -> int:
        """Beams that run."""
        return len(self._beams)

    def advance(self, candidates: Sequence[TopTokens]) -> list[Continuation]:
        """One round. candidates: of each running beam, by rank, its `num_candidates` best tokens.

        The beams of the next round by rank; none when the search is `done`.
        """
        assert not self.done and len(candidates) == len(self._beams)
        params = self.params
        length = len(self._beams[0].token_ids) + 1
        ranked = self._rank(candidates, length)
        ends = [self._end(token_id, length) for _, _, token_id, _ in ranked]
        for place, (entry, end) in enumerate(zip(ranked, ends, strict=True)):
            # The rest are there only to have enough that go on.
            if end and place < params.width:
                self._finish(entry, end, length)
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[params.width :]
        running = [entry for entry, end in zip(ranked, ends, strict=True) if not end]
        running = running[: params.width]
        self._beams = [self._extend(entry) for entry in running]
        self.done = not running or not self._can_improve(length)
        if self.done:
            return []
        return [Continuation(parent, token_id) for _, parent, token_id, _ in running]

    def _rank(
        self, candidates: Sequence[TopTokens], length: int
    ) -> list[tuple[float, int, int, float]]:
        """The best continuations of all beams: (-score, beam, token id, its logprob)."""
        params = self.params
        too_early = length <= params.min_new_tokens
        entries = [
            (-(beam.score + logprob), rank, token_id, logprob)
            for rank, (beam, tokens) in enumerate(zip(self._beams, candidates, strict=True))
            for token_id, logprob in zip(tokens.ids, tokens.logprobs, strict=True)
            if not (too_early and self._is_end(token_id))
        ]
        return nsmallest(params.width * max(2, 1 + params.num_ends), entries)

    def _is_end(self, token_id: int) -> bool:
        return token_id in self.params.eos_ids or token_id in self.params.stop_ids

    def _end(self, token_id: int, length: int) -> RowEnd:
        if token_id in self.params.eos_ids:
            return RowEnd.EOS
        if token_id in self.params.stop_ids:
            return RowEnd.STOP_TOKEN
        return RowEnd.LENGTH if length >= self.params.max_new_tokens else RowEnd.NONE

    def _extend(self, entry: tuple[float, int, int, float]) -> _Beam:
        negative, rank, token_id, logprob = entry
        parent = self._beams[rank]
        return _Beam((*parent.token_ids, token_id), (*parent.logprobs, logprob), -negative)

    def _finish(self, entry: tuple[float, int, int, float], end: RowEnd, length: int) -> None:
        beam = self._extend(entry)
        score = beam.score / length**self.params.length_penalty
        self.finished.append(Hypothesis(beam.token_ids, beam.logprobs, score, end))

    def _can_improve(self, length: int) -> bool:
        """Whether going on may still bring a better answer."""
        params = self.params
        if len(self.finished) < params.width:
            return True
        if params.early_stopping is EarlyStopping.FIRST:
            return False
        if params.early_stopping is EarlyStopping.NEVER and params.length_penalty > 0:
            length = params.max_new_tokens
        best = self._beams[0].score / length**params.length_penalty
        return best > self.finished[-1].score
