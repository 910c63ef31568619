"""Finds out whether a grammar can be followed, in a process of its own.

llguidance bounds what it spends on a grammar, but a schema that somebody built to hurt could still
take seconds, or all of a stack: that must be no router's loss. The worker (grammar_worker.py) is
started by the first grammar and compiles one at a time; one that takes too long, or brings it down,
is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from headgate.router.errors import OverloadedError, ValidationError
from headgate.router.grammar import Grammar

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 2.0
START_SECONDS = 60.0  # for the worker to load its vocabulary, on a busy machine
MAX_WAITING = 64  # grammars to compile
_CACHED = 1024  # outcomes; the memory they take is bounded too
_CACHED_CHARACTERS = 8 << 20
_MAX_LINE = 4 << 20  # bytes of a worker's answer


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
        self._turn = asyncio.Lock()
        self._worker: asyncio.subprocess.Process | None = None

    async def compile(self, grammar: Grammar, vocab_size: int, eos_token_ids: Sequence[int]) -> str:
        """The grammar as shards take it.

        Raises ValidationError with the reason where it cannot be followed, and OverloadedError
        where too many others are waiting to be compiled.
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

    async def close(self) -> None:
        """Ends the worker."""
        for task in list(self._pending.values()):
            task.cancel()
        await self._stop_worker()

    async def _compile_once(
        self, grammar: Grammar, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> Compiled:
        """Requests with the same grammar share one compilation, which outlives any of them."""
        task = self._pending.get(grammar)
        if task is None:
            if len(self._pending) >= MAX_WAITING:
                raise OverloadedError("Too many grammars are waiting to be compiled", retry_after=1)
            settings = {"vocab_size": vocab_size, "eos_token_ids": list(eos_token_ids)}
            task = asyncio.get_running_loop().create_task(self._take_turn(grammar, settings))
            self._pending[grammar] = task
            task.add_done_callback(lambda _: self._pending.pop(grammar, None))
        return await asyncio.shield(task)

    async def _take_turn(self, grammar: Grammar, settings: dict[str, object]) -> Compiled:
        async with self._turn:
            try:
                compiled = await self._ask(grammar, settings)
            except BaseException:
                await self._stop_worker()  # it may be in the middle of an answer
                raise
        self._remember(grammar, compiled)
        return compiled

    async def _ask(self, grammar: Grammar, settings: dict[str, object]) -> Compiled:
        worker = await self._running_worker(settings)
        assert worker.stdin is not None and worker.stdout is not None
        message = grammar.to_proto().SerializeToString()
        try:
            worker.stdin.write(len(message).to_bytes(4, "little") + message)
            await worker.stdin.drain()
            line = await asyncio.wait_for(worker.stdout.readline(), COMPILE_SECONDS)
        except asyncio.TimeoutError:
            await self._stop_worker()
            return Compiled(problem=f"it takes more than {COMPILE_SECONDS:g} seconds to compile")
        except (ConnectionError, ValueError):  # ValueError: a line beyond the limit
            line = b""
        if not line:
            await self._stop_worker()
            logger.warning("the grammar worker died of a grammar", extra={"fields": settings})
            return Compiled(problem="it cannot be compiled")
        return Compiled(**json.loads(line))

    async def _running_worker(self, settings: dict[str, object]) -> asyncio.subprocess.Process:
        if self._worker is not None and self._worker.returncode is None:
            return self._worker
        self._worker = worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "headgate.router.grammar_worker",
            json.dumps({"model_path": self._model_path, **settings}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE,
            start_new_session=True,  # a terminal's Ctrl-C is the launcher's to handle
        )
        assert worker.stdout is not None
        await asyncio.wait_for(worker.stdout.readline(), START_SECONDS)  # it is ready
        return worker

    async def _stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()

    def _remember(self, grammar: Grammar, compiled: Compiled) -> None:
        self._cache[grammar] = compiled
        self._cached_characters += _size(grammar, compiled)
        while len(self._cache) > _CACHED or self._cached_characters > _CACHED_CHARACTERS:
            self._cached_characters -= _size(*self._cache.popitem(last=False))


def _size(grammar: Grammar, compiled: Compiled) -> int:
    return sum(map(len, grammar.texts())) + len(compiled.grammar) + len(compiled.problem)
