"""Recorded calls: replays at other sizes, elsewhere, that fail; what can't be recorded and why."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from headgate.kernels.cpu import calls, operations
from headgate.kernels.cpu.memory_plan import Lifetime, plan_memory
from headgate.kernels.cpu.packed import PackedWeight
from headgate.kernels.cpu.program import Program
from headgate.kernels.cpu.recording import NotRecordable, Recording

pytestmark = pytest.mark.usefixtures("cpu_kernels")

MOST = 40
Piece = Callable[[torch.Tensor], torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def record(piece: Piece, x: torch.Tensor, externals: list[torch.Tensor] | None = None) -> Program:
    """A program of `piece` over any number of x's first rows."""
    recordings, outputs = [], []
    for rows in (3, 4):
        with Recording((rows,), externals or ()) as recording:
            outputs.append(piece(x[:rows]))
        recordings.append(recording)
    return Program(recordings, [[output] for output in outputs], (MOST,))


def run(program: Program, rows: int) -> torch.Tensor:
    beats = ctypes.c_int64(0)
    program.run((rows,), ctypes.addressof(beats))
    assert beats.value == len(program.calls)
    return program.outputs[0][:rows]


def block() -> Piece:
    """A norm, products and gates with a residual, twice: as in a model."""
    norm, bias = random(24, seed=1), random(100, seed=4)
    wide = PackedWeight(random(100, 24, seed=2), torch.bfloat16)
    narrow = PackedWeight(random(24, 50, seed=3), torch.float32)

    def piece(x: torch.Tensor) -> torch.Tensor:
        y = operations.rms_norm(x, norm, 1e-5)
        for _ in range(2):
            gated = operations.silu_and_mul(operations.linear(y, wide, bias))
            product = operations.linear(gated, narrow, None)
            y, x = operations.rms_norm_residual(product, x, norm, 0.125)
        return y

    return piece


def test_replays_of_any_size_give_the_same_bits() -> None:
    x, piece = torch.zeros(MOST, 24), block()
    program = record(piece, x)
    for rows in (1, 7, 2, MOST, 12):
        x.copy_(random(MOST, 24, seed=rows))
        assert torch.equal(run(program, rows), piece(x[:rows]))


def test_nothing_that_lives_together_shares_memory_and_the_rest_does() -> None:
    program = record(block(), torch.zeros(MOST, 24))
    lives = list(zip(program.lifetimes, program.offsets, strict=True))
    for index, (one, at) in enumerate(lives):
        assert at + one.size <= program.planned_bytes
        for other, other_at in lives[:index]:
            apart = one.last < other.first or other.last < one.first
            assert apart or at + one.size <= other_at or other_at + other.size <= at
    # Two wide buffers (product and gate) beside a narrow one or two; nine buffers in all.
    assert program.planned_bytes <= MOST * 4 * (100 + 50 + 24 + 24)
    assert program.buffer_bytes == MOST * 4 * (24 + 2 * (100 + 50 + 3 * 24))


def test_plans_of_random_lifetimes() -> None:
    random_numbers = torch.randint(1, 100, (200, 3), generator=torch.Generator().manual_seed(0))
    buffers = [
        Lifetime(size * 40, first, first + length // 10)
        for size, first, length in random_numbers.tolist()
    ]
    offsets, total = plan_memory(buffers)
    for index, one in enumerate(buffers):
        assert offsets[index] % 64 == 0 and offsets[index] + one.size <= total
        for other, start in list(zip(buffers, offsets, strict=True))[:index]:
            if one.first <= other.last and other.first <= one.last:
                assert offsets[index] + one.size <= start or start + other.size <= offsets[index]
    at_once = [sum(b.size for b in buffers if b.first <= t <= b.last) for t in range(120)]
    assert max(at_once) <= total <= 1.3 * max(at_once)


def test_externals_may_move() -> None:
    indices = torch.tensor([4, 0, 2] * MOST)[:MOST]
    table, other = random(6, 8), random(6, 8, seed=1)
    program = record(
        lambda x: operations.take_rows(table, indices[: len(x)]), torch.zeros(MOST, 1), [table]
    )
    for source in (table, other):
        program.bind([source.data_ptr()])
        assert torch.equal(run(program, 5), source[indices[:5]])


def test_a_program_may_have_no_result() -> None:
    k, slots, caches = random(MOST, 2, 4), torch.arange(MOST), torch.zeros(2, 3, 16, 2, 4)
    recordings = []
    for rows in (3, 4):
        with Recording((rows,), list(caches)) as recording:
            operations.write_kv(k[:rows], k[:rows], *caches, slots[:rows])
        recordings.append(recording)
    program = Program(recordings, [[], []], (MOST,))
    others = torch.zeros(2, 3, 16, 2, 4)
    program.bind([cache.data_ptr() for cache in others])
    program.run((9,), ctypes.addressof(ctypes.c_int64()))
    assert not program.outputs
    written = others.flatten(1, 2)
    assert torch.equal(written[:, :9], torch.stack([k[:9], k[:9]]))
    assert not written[:, 9:].any()


def test_a_call_that_fails_raises_what_it_raises_outside_a_replay() -> None:
    failing = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64)(lambda rows: rows - 3)
    x, y = torch.zeros(MOST, 8), random(8)
    program = record(lambda x: operations.rms_norm(operations.rms_norm(x, y, 1e-5), y, 1e-5), x)

    class Lost(Exception):
        pass

    program.calls[1] = program.calls[1]._replace(failure=Lost)
    program._call_table[1, 0] = ctypes.cast(failing, ctypes.c_void_p).value
    first = program._call_table[1, 1]
    rows = program._places[program._places >= first][0]  # its one argument that follows the size
    program._call_table[1, 1:] = (rows, 1, 0, 1)
    run(program, 3)
    with pytest.raises(Lost) as caught:
        run(program, 8)
    assert caught.value.args == (5,)


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        (lambda x: operations.rms_norm(x + 1, x[0], 1e-5), "aten.add"),
        (lambda x: operations.rms_norm(x, x[0], 1e-5).mul_(2), "aten.mul_"),
        (lambda x: operations.rms_norm(x, x[0], float(x.numpy().sum())), "aten.detach"),
        (lambda x: operations.rms_norm(x, x[0], 1e-5 * len(x)), "argument 10 of hg_rms_norm"),
        (lambda x: operations.rms_norm(x[-1:], x[0], 1e-5), "at another place each time"),
        (lambda x: operations.rms_norm(x, x[0], 1e-5) if len(x) < 4 else x, "calls it makes"),
        (lambda x: x, "not in memory of its own"),
        (lambda x: operations.rms_norm(x, x[0], 1e-5)[:, ::2], "contiguous"),
    ],
)
def test_what_cannot_be_recorded_says_why(piece: Piece, reason: str) -> None:
    x = random(MOST, 8)
    with pytest.raises(NotRecordable, match=reason):
        record(piece, x)


def test_recording_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), Recording((1,)):
        operations.rms_norm(random(2, 8), random(8), 1 / 0)
    assert calls.current.recording is None
    assert (torch.ones(2) + 1).sum() == 4
