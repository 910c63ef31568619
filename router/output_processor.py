"""Sampled tokens to what a client reads: text, logprobs, the reason for the end.

Holds the text side of each request (router/request.py holds the ids). Sends nothing and
knows no clock: the engine does both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from headgate.proto import router_pb2
from headgate.proto.messages import PromptLogprobs, RowEnd, TopTokens
from headgate.router.beam_search import Hypothesis
from headgate.router.detokenizer import Detokenizer, Pieces
from headgate.router.pooling import normalised
from headgate.router.row_output import RowOutput
from headgate.router.stop_strings import StopMatcher
from headgate.router.validation import ValidRequest

FINISH_REASONS = {
    RowEnd.LENGTH: router_pb2.FINISH_REASON_LENGTH,
    RowEnd.EOS: router_pb2.FINISH_REASON_EOS_TOKEN,
    RowEnd.STOP_TOKEN: router_pb2.FINISH_REASON_STOP_SEQUENCE,
}


_TOKEN_ENDS = (RowEnd.EOS, RowEnd.STOP_TOKEN)


@dataclass(eq=False)
class Outcome:
    """What one token brought.

    One is made per token: neither frozen nor with slots, so that what it does not have costs
    nothing, being the class's.
    """

    index: int  # of the answer
    position: int  # of the token in the answer, or of the next one where there is none
    text_offset: int  # characters released before
    text: str = ""  # released
    token_id: int | None = None  # None: only text
    token_text: str = ""
    special: bool = field(default=False, init=False)
    logprob: float | None = field(default=None, init=False)
    top: Sequence[router_pb2.Token] = field(default=(), init=False)
    # Unspecified: it goes on.
    reason: router_pb2.FinishReason = field(
        default=router_pb2.FINISH_REASON_UNSPECIFIED, init=False
    )
    # A stop text was found: the shards do not know of the end.
    by_text: bool = field(default=False, init=False)
    embedding: Sequence[float] = field(default=(), init=False)  # what came instead of tokens

    @property
    def tokens(self) -> router_pb2.Tokens:
        """The token as a message."""
        message = router_pb2.Tokens(
            index=self.index,
            first_index=self.position,
            text=self.text,
            text_offset=self.text_offset,
        )
        if self.token_id is not None:
            message.tokens.add(
                id=self.token_id,
                text=self.token_text,
                logprob=self.logprob,
                special=self.special,
                top=self.top,
            )
        return message


class Answer:
    """The text of one request as it grows."""

    def __init__(self, valid: ValidRequest, pieces: Pieces, index: int = 0) -> None:
        """`index`: which of the request's answers it is."""
        self._valid = valid
        self._index = index
        self._pieces = pieces
        self._detokenizer = Detokenizer(pieces, valid.prompt_ids, valid.skip_special_tokens)
        self._stops = StopMatcher(valid.stop, valid.include_stop)
        self._parts: list[str] = []  # visible text
        self._length = 0  # characters of it
        self._sent = 0  # characters given out in events
        self._prompt_logprobs: dict[int, tuple[float, TopTokens | None]] = {}  # by position
        self._special_ids = pieces.special_ids
        self._has_stops = bool(self._stops.stops)
        self._with_logprobs = valid.sampling.logprobs
        self.num_tokens = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def stop_text(self) -> str:
        return self._stops.matched or ""

    def push(
        self,
        id_: int,
        logprob: float = 0.0,
        top: TopTokens | None = None,
        end: RowEnd = RowEnd.NONE,
    ) -> Outcome:
        """Takes the next token. `end`: why the shards ended the row with it."""
        if self._valid.scores_only:
            outcome = Outcome(self._index, 0, 0)
            outcome.reason = router_pb2.FINISH_REASON_LENGTH
            return outcome
        position = self.num_tokens
        self.num_tokens = position + 1
        # The token that ends an answer is no part of its text where stop texts are none either.
        hidden = end in _TOKEN_ENDS and not self._valid.include_stop if end else False
        text, visible = self._detokenizer.push(id_, hidden)
        released = self._release(visible, position) if self._has_stops else visible
        ended = end or self._stops.matched is not None
        if ended:
            rest, visible = self._detokenizer.flush()
            text += rest
            released += self._release(visible, position)
            if self._stops.matched is None:
                released += self._stops.flush()
        sent = self._sent
        outcome = Outcome(self._index, position, sent, self._give_out(released), id_, text)
        if id_ in self._special_ids:
            outcome.special = True
        if self._with_logprobs:
            outcome.logprob = logprob
        if top is not None and self._valid.sampling.top_n_tokens:
            outcome.top = self._alternatives(top)
        if ended:
            stopped = self._stops.matched is not None and end is not RowEnd.EOS
            outcome.by_text = stopped and not end
            outcome.reason = (
                router_pb2.FINISH_REASON_STOP_SEQUENCE if stopped else FINISH_REASONS[end]
            )
        return outcome

    def take(self, output: RowOutput) -> Outcome | None:
        """A step's part for this answer. None: only prompt logprobs came."""
        if output.prompt_logprobs is not None:
            self.take_prompt_logprobs(output.prompt_logprobs)
        if output.pooled is not None:
            return self.embed(output.pooled)
        if output.token_id is None:
            return None
        return self.push(output.token_id, output.logprob, output.top, output.end)

    def push_all(self, hypothesis: Hypothesis) -> tuple[router_pb2.Tokens, Outcome]:
        """Takes a whole answer; its tokens as one message, and what the last of them brought."""
        message = router_pb2.Tokens(index=self._index)
        *others, last = zip(hypothesis.token_ids, hypothesis.logprobs, strict=True)
        for id_, logprob in others:
            message.MergeFrom(self.push(id_, logprob).tokens)
        outcome = self.push(*last, end=hypothesis.end)
        message.MergeFrom(outcome.tokens)
        message.first_index, message.text_offset, message.text = 0, 0, self.text
        return message, outcome

    def replay(self, tokens: Iterable[router_pb2.Token], text_offset: int, end: RowEnd) -> Outcome:
        """Takes tokens that an earlier router delivered, with the text up to `text_offset`.

        `end`: what the last of them means to a shard. The outcome's event has no token: only
        text that is due, or none.
        """
        reason, by_text = router_pb2.FINISH_REASON_UNSPECIFIED, False
        ids = [token.id for token in tokens]
        for place, id_ in enumerate(ids, start=1):
            outcome = self.push(id_, end=end if place == len(ids) else RowEnd.NONE)
            reason, by_text = outcome.reason, outcome.by_text
            if reason:
                break
        self._sent = text_offset
        text = self._give_out("")
        outcome = Outcome(self._index, self.num_tokens, text_offset, text)
        outcome.reason, outcome.by_text = reason, by_text
        return outcome

    def embed(self, pooled: Sequence[float]) -> Outcome:
        """The pooled prompt, in place of an answer."""
        outcome = Outcome(self._index, 0, 0)
        outcome.reason = router_pb2.FINISH_REASON_POOLED
        outcome.embedding = normalised(pooled) if self._valid.normalize else pooled
        return outcome

    def take_prompt_logprobs(self, entry: PromptLogprobs) -> None:
        for offset, logprob in enumerate(entry.logprobs):
            top = entry.top[offset] if entry.top else None
            self._prompt_logprobs[entry.start + offset] = (logprob, top)

    def prefill_tokens(self) -> list[router_pb2.Token]:
        """The prompt's tokens with their logprobs; the first has none.

        Empty if not asked for, and for all answers but the first: the prompt is the same.
        """
        if self._index or not self._valid.sampling.prompt_logprobs:
            return []
        detokenizer = Detokenizer(self._pieces, (), False)
        tokens = []
        for position, id_ in enumerate(self._valid.prompt_ids):
            text, _ = detokenizer.push(id_)
            token = router_pb2.Token(id=id_, text=text, special=detokenizer.is_special(id_))
            if position in self._prompt_logprobs:
                token.logprob, top = self._prompt_logprobs[position]
                if top is not None and self._valid.sampling.prompt_top_n_tokens:
                    token.top.extend(self._alternatives(top))
            tokens.append(token)
        tokens[-1].text += detokenizer.flush()[0]
        return tokens

    def _release(self, visible: str, index: int) -> str:
        """The text that may go out; stop texts count from token min_new_tokens on."""
        if index < self._valid.sampling.min_new_tokens:
            return visible
        return self._stops.push(visible)

    def _give_out(self, released: str) -> str:
        """The text that goes out: `released`, but for characters that are out already."""
        self._parts.append(released)
        self._length = length = self._length + len(released)
        due = length - self._sent
        if due <= 0:
            return ""
        self._sent = length
        return released if due == len(released) else self.text[-due:]

    def _alternatives(self, top: TopTokens) -> list[router_pb2.Token]:
        special = self._pieces.special_ids
        return [
            router_pb2.Token(
                id=id_, text=self._pieces.decode_one(id_), logprob=logprob, special=id_ in special
            )
            for id_, logprob in zip(top.ids, top.logprobs, strict=True)
        ]


class OutputProcessor:
    """What answers are made with: the vocabulary's pieces and the model's ends of sequence."""

    def __init__(self, pieces: Pieces, eos_token_ids: Sequence[int] = ()) -> None:
        """`eos_token_ids`: the model's, as its shards tell them; may be set later."""
        self._pieces = pieces
        self.eos_token_ids = frozenset(eos_token_ids)

    def answer(self, valid: ValidRequest, index: int = 0) -> Answer:
        """A new one, the request's `index`th."""
        return Answer(valid, self._pieces, index)

    def end_of(self, valid: ValidRequest, ids: Sequence[int]) -> RowEnd:
        """How a shard would end a row with these output ids; NONE: it would go on."""
        sampling = valid.sampling
        if sampling.grammar and ids and ids[-1] in self.eos_token_ids:
            return RowEnd.EOS
        if ids and len(ids) > sampling.min_new_tokens:
            if ids[-1] in self.eos_token_ids and not sampling.ignore_eos:
                return RowEnd.EOS
            if ids[-1] in sampling.stop_token_ids:
                return RowEnd.STOP_TOKEN
        return RowEnd.LENGTH if len(ids) >= sampling.max_new_tokens else RowEnd.NONE
