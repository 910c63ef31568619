"""Finds out whether a grammar can be followed, in a process of its own.

llguidance bounds what it spends on a grammar, but a schema that somebody built to hurt could still
take seconds, or all of a stack: that must be no router's loss. The worker (grammar_worker.py) is
started by the first grammar and compiles one at a time; one that takes too long, or brings it down,
is refused, and the worker replaced. A worker that somebody else ended, or that does not start, says
nothing of the grammar: who asked may ask again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from headgate.router.errors import OverloadedError, UnavailableError, ValidationError
from headgate.router.grammar import Grammar
from headgate.router.grammar_process import GrammarProcess, WorkerCrashed, WorkerLost

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 2.0
RETRY_SECONDS = 1.0
MAX_WAITING = 64  # grammars to compile
_CACHED = 1024  # outcomes; the memory they take is bounded too
_CACHED_CHARACTERS = 8 << 20


@dataclass(frozen=True, slots=True)
class Compiled:
    """An outcome: what the shards get, or why there is none."""

    grammar: str = ""
    problem: str = ""


class GrammarCompiler:
    """One per router. Belongs to the event loop's thread."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path
        self._cache: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._cached_characters = 0
        self._pending: dict[Grammar, asyncio.Task[Compiled]] = {}
        self._process = GrammarProcess()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")  # the process's owner

    async def compile(self, grammar: Grammar, vocab_size: int, eos_token_ids: Sequence[int]) -> str:
        """The grammar as shards take it.

        Raises ValidationError with the reason where it cannot be followed, OverloadedError where
        too many others are waiting to be compiled, and UnavailableError where the worker was lost.
        """
        grammar.check()
        compiled = self._cache.get(grammar)
        if compiled is None:
            compiled = await self._compile_once(grammar, vocab_size, eos_token_ids)
        else:
            self._cache.move_to_end(grammar)
        if compiled.problem:
            raise ValidationError(f"grammar is not valid: {compiled.problem}", field="grammar")
        return compiled.grammar

    def close(self) -> None:
        """Ends the worker."""
        self._process.stop()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _compile_once(
        self, grammar: Grammar, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> Compiled:
        """Requests with the same grammar share one compilation, which outlives any of them."""
        task = self._pending.get(grammar)
        if task is None:
            if len(self._pending) >= MAX_WAITING:
                raise OverloadedError("Too many grammars are waiting to be compiled", retry_after=1)
            settings = {
                "model_path": self._model_path,
                "vocab_size": vocab_size,
                "eos_token_ids": list(eos_token_ids),
            }
            task = asyncio.get_running_loop().create_task(self._ask(grammar, settings))
            self._pending[grammar] = task
            task.add_done_callback(lambda done: self._compiled(grammar, done))
        return await asyncio.shield(task)

    def _compiled(self, grammar: Grammar, task: asyncio.Task[Compiled]) -> None:
        del self._pending[grammar]
        if not task.cancelled():
            task.exception()  # marks it as seen: who asked may have left

    async def _ask(self, grammar: Grammar, settings: dict[str, object]) -> Compiled:
        message = grammar.to_proto().SerializeToString()
        try:
            answer = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._process.ask, message, settings, COMPILE_SECONDS
            )
        except TimeoutError:
            compiled = Compiled(
                problem=f"it takes more than {COMPILE_SECONDS:g} seconds to compile"
            )
        except WorkerCrashed as error:
            logger.warning("a grammar brought its worker down: %s", error)
            compiled = Compiled(problem="it cannot be compiled")
        except WorkerLost as error:
            logger.warning("the grammar worker was lost: %s", error)
            raise UnavailableError(
                "The process that compiles grammars was lost; ask again", retry_after=RETRY_SECONDS
            ) from error
        else:
            compiled = Compiled(**answer)
        self._remember(grammar, compiled)
        return compiled

    def _remember(self, grammar: Grammar, compiled: Compiled) -> None:
        self._cache[grammar] = compiled
        self._cached_characters += _size(grammar, compiled)
        while len(self._cache) > _CACHED or self._cached_characters > _CACHED_CHARACTERS:
            self._cached_characters -= _size(*self._cache.popitem(last=False))


def _size(grammar: Grammar, compiled: Compiled) -> int:
    return sum(map(len, grammar.texts())) + len(compiled.grammar) + len(compiled.problem)
