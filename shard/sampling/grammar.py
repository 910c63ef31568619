"""Grammars of rows: which tokens may come next, as masks that are computed beside the forward pass.

The sampling rank alone follows grammars. A matcher is no more than a row's output tokens read by
its grammar, so that it can be made anew from them at any time: after a preemption, in a forked row,
in a shard that took over.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

BoolArray = npt.NDArray[np.bool_]
TokenArray = npt.NDArray[np.integer]

_MAX_COMPILED = 64  # grammars kept for rows to come
_LEARNING_ROWS = 8  # of a grammar, whose tables later rows begin with
_NO_TOKEN_LEFT = "the grammar leaves no token to choose"


class RowGrammar:
    """A row's grammar, and on the sampling rank how far its output has been read."""

    __slots__ = ("_matcher", "_num_read", "source")

    def __init__(self, source: str) -> None:
        """`source`: llguidance's form, as a plan brings it."""
        self.source = source
        self._matcher: LLMatcher | None = None
        self._num_read = 0  # output tokens

    @property
    def is_begun(self) -> bool:
        """Whether it has a matcher, and needs its source compiled no more."""
        return self._matcher is not None

    def fork(self, num_output: int) -> RowGrammar:
        """The grammar of a row that shares the first `num_output` tokens of the output."""
        child = RowGrammar(self.source)
        if self._matcher is not None:
            surplus = self._num_read - num_output
            matcher = self._matcher.deep_copy()
            if surplus <= 0 or matcher.rollback(surplus):
                child._matcher, child._num_read = matcher, min(self._num_read, num_output)
        return child

    def read(self, output: TokenArray, new_matcher: Callable[[str], LLMatcher]) -> LLMatcher:
        """The matcher after `output`, all of the row's so far. Raises GrammarError."""
        if self._matcher is None:
            self._matcher, self._num_read = new_matcher(self.source), 0
        if self._num_read < len(output):
            self._matcher.consume_tokens(output[self._num_read :].tolist())
            self._num_read = len(output)
        return self._matcher

    def reread(self, output: TokenArray, matcher: LLMatcher) -> LLMatcher:
        """As `read`, from the beginning, with another matcher."""
        self._matcher = None
        return self.read(output, lambda _: matcher)


@dataclass(frozen=True, slots=True)
class ConstrainedRow:
    """A row with a grammar that is about to get a token."""

    slot: int
    grammar: RowGrammar
    output: TokenArray  # tokens generated so far


@dataclass(frozen=True, slots=True)
class Masks:
    """What grammars say about a step's rows. Keys are slots."""

    allowed: dict[int, BoolArray] = field(default_factory=dict)  # [vocab]
    failures: dict[int, str] = field(default_factory=dict)  # rows that cannot go on, and why


NO_MASKS = Masks()


class GrammarMasks:
    """Compiles grammars and computes masks, in threads of its own.

    llguidance and the vocabulary are loaded when the first grammar comes.
    """

    def __init__(
        self, model_path: str, vocab_size: int, eos_token_ids: Sequence[int], num_threads: int
    ) -> None:
        self._model_path = model_path
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._num_threads = num_threads
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar-compiler")
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._lock = threading.Lock()  # of `_compiled` and `_learnt`
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._learnt: dict[str, tuple[LLMatcher, int]] = {}  # with rows that it learnt from
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None

    def prepare(self, source: str) -> Future[LLMatcher]:
        """Begins to compile a grammar that will be needed soon. For any thread."""
        with self._lock:
            future = self._compiled.get(source)
            if future is None:
                future = self._compiled[source] = self._compiler.submit(self._compile, source)
                if len(self._compiled) > _MAX_COMPILED:
                    self._learnt.pop(self._compiled.popitem(last=False)[0], None)
            else:
                self._compiled.move_to_end(source)
        return future

    def begin(self, rows: Sequence[ConstrainedRow]) -> Callable[[], Masks]:
        """Begins to compute the rows' masks; what it returns waits for them.

        Until then the rows' tokens and grammars must be left alone.
        """
        if not rows:
            return lambda: NO_MASKS
        # Rows under way need nothing: there may be more grammars than are kept.
        new = {row.grammar.source for row in rows if not row.grammar.is_begun}
        futures = {source: self.prepare(source) for source in new}
        return self._filler.submit(self._fill, rows, futures).result

    def _compile(self, source: str) -> LLMatcher:
        from headgate.grammar_engine import load_tokenizer, new_matcher

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self._model_path, self._vocab_size, self._eos_token_ids
            )
        matcher = new_matcher(self._tokenizer, source)
        matcher.compute_bitmask()  # the first one takes longest, and copies keep what it found
        return matcher

    def _new_matcher(self, source: str, compiled: Future[LLMatcher]) -> LLMatcher:
        """A matcher at the beginning, with the tables of the grammar's first rows.

        A matcher builds its tables as it goes, which doubles a mask's time, and copies take along
        what is there. Raises GrammarError.
        """
        known, num_rows = self._learnt.get(source, (None, 0))
        matcher = None if known is None or known.is_error() else known.deep_copy()
        if matcher is None or not matcher.reset():
            matcher = compiled.result().deep_copy()
        with self._lock:
            if num_rows < _LEARNING_ROWS and source in self._compiled:
                self._learnt[source] = matcher, num_rows + 1
        return matcher

    def _fill(self, rows: Sequence[ConstrainedRow], futures: dict[str, Future[LLMatcher]]) -> Masks:
        from headgate.grammar_engine import GrammarError, error_of

        masks = Masks()
        matchers: list[tuple[ConstrainedRow, LLMatcher]] = []
        for row in rows:
            try:
                matcher = row.grammar.read(
                    row.output, lambda source: self._new_matcher(source, futures[source])
                )
            except GrammarError as error:
                masks.failures[row.slot] = str(error)
            except Exception:  # of this row only
                logger.exception("the grammar of a row cannot be followed")
                masks.failures[row.slot] = "the grammar cannot be followed"
            else:
                matchers.append((row, matcher))
        words = self._bit_masks([matcher for _, matcher in matchers])
        for (row, matcher), bits in zip(matchers, words, strict=True):
            if matcher.is_error():
                # Tables of other rows count against its limits: by itself it might go on.
                compiled = self.prepare(row.grammar.source).result()
                matcher = row.grammar.reread(row.output, compiled.deep_copy())
                bits = self._bit_masks([matcher])[0]
            allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
            if matcher.is_error():
                masks.failures[row.slot] = error_of(matcher)
            elif not allowed.any():
                masks.failures[row.slot] = _NO_TOKEN_LEFT
            else:
                masks.allowed[row.slot] = allowed
        return masks

    def _bit_masks(self, matchers: Sequence[LLMatcher]) -> npt.NDArray[np.uint8]:
        """One bit per token, lowest first: uint8[len(matchers), vocab / 8, rounded up to words]."""
        from llguidance import LLExecutor

        words = np.zeros((len(matchers), -(-self._vocab_size // 32)), np.uint32)
        row_bytes = words.shape[1] * words.itemsize
        if len(matchers) == 1:
            matchers[0].unsafe_compute_mask_ptr(words.ctypes.data, row_bytes)
        elif matchers:
            if self._executor is None:
                self._executor = LLExecutor(self._num_threads)
            places = [(matcher, index) for index, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(
                places, words.ctypes.data, row_bytes, len(matchers)
            )
        return words.view(np.uint8)
