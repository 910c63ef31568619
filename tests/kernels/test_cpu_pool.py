"""The kernels' thread pool: called from many threads, resized, idle, and across a fork."""

from __future__ import annotations

import os
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from headgate.kernels.cpu import operations, set_num_threads
from headgate.kernels.cpu.packed import PackedWeight

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.fixture
def product() -> tuple[torch.Tensor, PackedWeight, torch.Tensor]:
    """Inputs, weights and their product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 192, generator=generator)
    weight = PackedWeight(torch.randn(320, 192, generator=generator), torch.float32)
    return x, weight, operations.linear(x, weight, None)


Product = tuple[torch.Tensor, PackedWeight, torch.Tensor]


def threads_named_ours() -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum((task / "comm").read_text().strip() == "headgate-cpu" for task in tasks)


def threads_become(count: int) -> bool:
    """A thread's entry may outlast it, or be without its name yet, for a moment."""
    end = time.monotonic() + 10
    while threads_named_ours() != count and time.monotonic() < end:
        time.sleep(0.001)
    return threads_named_ours() == count


def test_calls_from_many_threads_take_turns(product: Product) -> None:
    x, weight, expected = product
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(100):
            if not torch.equal(operations.linear(x, weight, None), expected):
                wrong.append(index)

    set_num_threads(3)
    callers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


def test_threads_come_and_go(product: Product) -> None:
    x, weight, expected = product
    for count in (1, 4, 2, 6, 1, 3):
        set_num_threads(count)
        for _ in range(20):
            assert torch.equal(operations.linear(x, weight, None), expected)
        assert threads_become(count - 1)


def test_idle_threads_use_no_processor_time(product: Product) -> None:
    x, weight, _ = product
    set_num_threads(4)
    operations.linear(x, weight, None)
    time.sleep(0.01)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02


def test_a_forked_child_starts_threads_of_its_own(product: Product) -> None:
    x, weight, expected = product
    set_num_threads(3)
    operations.linear(x, weight, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of any such fork
        child = os.fork()
    if child == 0:
        equal = torch.equal(operations.linear(x, weight, None), expected)
        os._exit(0 if equal and threads_become(2) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(operations.linear(x, weight, None), expected)
