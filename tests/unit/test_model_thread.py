"""The model's thread: what it does while there are no jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from headgate.shard.model_thread import ModelThread


class IdleWork:
    """So many pieces, of which each is `seconds` long."""

    def __init__(self, pieces: int, seconds: float = 0.0) -> None:
        self.left = pieces
        self.seconds = seconds
        self.calls = 0
        self.ended = threading.Event()

    def __call__(self) -> bool:
        self.calls += 1
        time.sleep(self.seconds)
        self.left -= 1
        if self.left <= 0:
            self.ended.set()
        return self.left > 0


@pytest.fixture
def errors() -> list[BaseException]:
    return []


@pytest.fixture
def thread(errors: list[BaseException]) -> Iterator[ModelThread]:
    yield ModelThread(1, errors.append)
    assert not errors


def test_idle_work_is_done_once_no_job_has_come_for_a_while(thread: ModelThread) -> None:
    work = IdleWork(5)
    thread.when_idle(work)
    thread.call(lambda: None)
    assert work.ended.wait(10)
    assert work.calls == 5
    time.sleep(0.1)
    assert work.calls == 5  # nothing was left
    work.ended.clear()
    thread.call(lambda: None)
    assert work.ended.wait(10)  # after a job there may be more


def test_a_job_waits_for_one_piece_of_idle_work_at_most(thread: ModelThread) -> None:
    work = IdleWork(1000, seconds=0.2)
    thread.when_idle(work)
    while not work.calls:
        time.sleep(0.001)
    before = work.calls
    thread.call(lambda: None)
    assert work.calls <= before + 2
    assert not work.ended.is_set()


def test_idle_work_that_fails_is_fatal(errors: list[BaseException]) -> None:
    def fail() -> bool:
        raise ValueError("broken")

    thread = ModelThread(1, errors.append)
    thread.when_idle(fail)
    thread.call(lambda: None)
    end = time.monotonic() + 10
    while not errors and time.monotonic() < end:
        time.sleep(0.001)
    thread.when_idle(lambda: False)
    assert [str(error) for error in errors[:1]] == ["broken"]
