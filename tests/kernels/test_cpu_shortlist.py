"""Likeliest tokens by a shortlist: those of the whole product, whatever the numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from headgate.kernels import ops
from headgate.kernels.cpu import operations, set_num_threads
from headgate.kernels.cpu.packed import PackedWeight
from headgate.kernels.cpu.shortlist import Shortlist, linear_largest
from tests.kernels.ranks import OneOfSeveral, of_ranks

pytestmark = pytest.mark.usefixtures("cpu_kernels")

SIZES = [(1000, 100), (33, 577), (64, 64), (5, 3), (1, 1), (4100, 640)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Head:
    """A vocabulary's weights, both ways."""

    def __init__(self, weight: torch.Tensor, precision: str = "highest") -> None:
        table = weight.bfloat16().contiguous()
        packed = operations.pack_linear(table, torch.bfloat16, "", precision)
        assert isinstance(packed, PackedWeight)
        self.packed, self.shortlist = packed, Shortlist(table)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        return operations.linear(x, self.packed, None)

    def largest(
        self, x: torch.Tensor, largest: int = 1, ranks: ops.Ranks | None = None
    ) -> torch.Tensor:
        ranks = OneOfSeveral(0, 1) if ranks is None else ranks
        return linear_largest(x, self.packed, self.shortlist, largest, ranks)

    def check(self, x: torch.Tensor) -> float:
        """The share of the products that came out exactly."""
        return check(self.exact(x), self.largest(x))


def check(exact: torch.Tensor, found: torch.Tensor) -> float:
    tokens = operations.argmax(exact)
    assert (operations.argmax(found) == tokens).all()
    rows = torch.arange(len(exact))
    top = exact[rows, torch.from_numpy(tokens)]
    same = found.view(torch.int32) == exact.view(torch.int32)
    assert same[rows, torch.from_numpy(tokens)].all()
    assert (same | (found < top[:, None])).all()
    return float(same.float().mean())


def together(heads: Sequence[Head], x: torch.Tensor) -> list[torch.Tensor]:
    """What each finds that has a part of the columns."""
    return of_ranks(len(heads), lambda rank, ranks: heads[rank].largest(x, ranks=ranks))


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_largest_are_exact(size: tuple[int, int], precision: str) -> None:
    head = Head(random(*size), precision)
    for rows in (1, 2, 9, 40):
        x = random(rows, size[1] + 3, seed=rows)[:, :-3] * 5
        for threads in (1, 2, 5):
            set_num_threads(threads)
            share = head.check(x)
        if size[0] >= 1000:
            assert share < 0.05
        assert torch.equal(head.largest(x, 0), head.exact(x))
    assert head.largest(x[:0]).shape == (0, size[0])


def test_rows_near_a_tie_and_equal_ones() -> None:
    """The first of equals, and the larger of two that int8 weights do not tell apart."""
    weight = random(500, 96)
    weight[100:300] = weight[100]
    weight[200:250, 5] *= 1 + 2**-7
    head = Head(weight)
    x = torch.cat([weight[100:101] + random(40, 96, seed=1) * 0.01, weight[200:201]])
    head.check(x)
    assert int(operations.argmax(head.largest(weight[100:101].clone()))[0]) in range(100, 300)


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e-12, 1.0, 1e12, 1e25, 1e36])
def test_numbers_of_any_size(scale: float) -> None:
    weight, x = random(300, 70), random(6, 70, seed=1)
    x[1, 3] = 2e4  # drives all others out of the bytes
    x[2] = 0
    x[3, :64] = 0
    weight[7, 2] = 300
    weight[8] = 0
    Head(weight).check(x * scale)
    Head(weight * scale).check(x)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_a_number(value: float) -> None:
    for column in (0, 130, 299):
        weight, x = random(300, 70), random(6, 70, seed=1)
        x[2, 5] = x[4, 69] = value
        Head(weight).check(x)
        weight[column, 3] = value
        head = Head(weight)
        for rows in (x, random(6, 70, seed=2), -random(6, 70, seed=2)):
            exact, found = operations.argmax(head.exact(rows)), head.largest(rows)
            assert (operations.argmax(found) == exact).all()


def test_inputs_of_another_shape_are_refused() -> None:
    head = Head(random(64, 32))
    for x in (random(2, 33), random(2, 32).bfloat16(), random(2, 2, 32)):
        with pytest.raises(ValueError, match=r"linear_largest takes float32 \[R, 32\]"):
            head.largest(x)


@pytest.mark.parametrize("cuts", [(500,), (32, 900), (1, 2, 999)])
def test_ranks_with_a_part_of_the_columns_each(cuts: tuple[int, ...]) -> None:
    weight, x = random(1000, 100), random(9, 100, seed=1)
    weight[700] = weight[40]  # of two ranks' equals the first
    x[3] = weight[40]
    heads = [Head(part) for part in weight.tensor_split(cuts)]
    exact = torch.cat([head.exact(x) for head in heads], 1)
    assert check(exact, torch.cat(together(heads, x), 1)) < 0.05
    assert int(operations.argmax(exact)[3]) == 40


def test_what_stays_below_another_rank_is_left_out() -> None:
    """Columns close together, all of which one rank alone would have to work out."""
    likely, x = random(64, 96), random(1, 96, seed=1)
    likely[20] = x[0]
    rare = random(1, 96, seed=2).expand(500, 96) * (1 + random(500, 1, seed=3) / 1000)
    heads = Head(likely), Head(rare)
    alone, beside = heads[1].largest(x), together(heads, x)[1]
    exact = heads[1].exact(x)
    assert (alone == exact).float().mean() > 0.5
    assert (beside == exact).sum() == 1  # the one that it had to tell
    assert (beside < heads[0].exact(x).max()).all()


def test_ranks_one_of_which_has_nothing_but_what_is_not_a_number() -> None:
    for value in (float("inf"), float("-inf"), float("nan")):
        weight, x = random(300, 70), random(6, 70, seed=1)
        weight[150:] = value
        heads = [Head(part) for part in weight.tensor_split((150,))]
        exact = torch.cat([head.exact(x) for head in heads], 1)
        found = torch.cat(together(heads, x), 1)
        assert (operations.argmax(found) == operations.argmax(exact)).all()
