"""The one thread that touches the model: jobs run in the order in which they were given.

One thread, so that tensor operations keep one pool of workers, and steps one order. What jobs do is
not its business; a job that fails is fatal to the process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Job = Callable[[], Any]

_QUIET = 0.02  # seconds without a job after which idle work begins


class ModelThread:
    """Runs jobs until the process ends."""

    def __init__(self, num_threads: int, fatal: Callable[[BaseException], None]) -> None:
        """`num_threads` for tensor operations; `fatal` is called with what a job raised."""
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._num_threads = num_threads
        self._fatal = fatal
        self._idle_work: Callable[[], bool] = lambda: False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def post(self, job: Job) -> None:
        """Queues a job nobody waits for."""
        self._jobs.put(job)

    def call(self, job: Callable[[], T]) -> T:
        """Runs a job and returns its result, or raises what it raised after `fatal` returned."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)
                raise

        self.post(run)
        return done.result()

    def when_idle(self, work: Callable[[], bool]) -> None:
        """Has `work` called again and again while there are no jobs, until it returns False.

        A job that comes waits for the call under way, which must be short.
        """
        self._idle_work = work

    def fail(self, error: BaseException) -> None:
        """Ends the process for an error of another thread."""
        self._fatal(error)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            while True:
                try:
                    self._next_job()()
                except BaseException as error:
                    self._fatal(error)

    def _next_job(self) -> Job:
        pause = _QUIET
        while True:
            try:
                return self._jobs.get(timeout=pause)
            except queue.Empty:
                if not self._idle_work():
                    return self._jobs.get()
            pause = 0.0
