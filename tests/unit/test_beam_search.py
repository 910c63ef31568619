"""The search itself, on tables of logprobs: what Transformers' rules make of them."""

from __future__ import annotations

import pytest

from headgate.proto.messages import RowEnd, TopTokens
from headgate.router.beam_search import BeamParams, BeamSearch, EarlyStopping

EOS = 9


def top(**logprobs: float) -> TopTokens:
    """Tokens by name: t5=-0.1 is token 5."""
    pairs = sorted(
        ((int(name[1:]), value) for name, value in logprobs.items()), key=lambda p: -p[1]
    )
    return TopTokens([token for token, _ in pairs], [value for _, value in pairs])


def search(width: int = 2, new: int = 4, **fields: object) -> BeamSearch:
    params = BeamParams(width=width, max_new_tokens=new, eos_ids=frozenset({EOS}), **fields)  # type: ignore[arg-type]
    return BeamSearch(params)


def moves(one: BeamSearch, *tops: TopTokens) -> list[tuple[int, int]]:
    return [(c.parent, c.token_id) for c in one.advance(list(tops))]


def test_the_best_continuations_of_all_beams_go_on() -> None:
    beams = search()
    assert moves(beams, top(t1=-0.5, t2=-1.0, t3=-2.0, t4=-9.0)) == [(0, 1), (0, 2)]
    # 1 + 5: -0.6; 1 + 6: -0.7; 2 + 5: -1.1: both go on from the better beam.
    assert moves(beams, top(t5=-0.1, t6=-0.2, t7=-4.0), top(t5=-0.1, t6=-5.0)) == [(0, 5), (0, 6)]


def test_equal_scores_go_to_the_better_beam_then_the_lower_token() -> None:
    beams = search()
    assert moves(beams, top(t2=-1.0, t1=-1.0, t3=-1.0)) == [(0, 1), (0, 2)]
    assert moves(beams, top(t5=-1.0, t6=-2.0), top(t4=-1.0, t6=-2.0)) == [(0, 5), (1, 4)]


def test_a_beam_that_ends_gives_its_place_to_the_next() -> None:
    beams = search(early_stopping=EarlyStopping.NEVER, length_penalty=0.0)
    assert moves(beams, top(t9=-0.1, t1=-0.5, t2=-1.0)) == [(0, 1), (0, 2)]
    (ended,) = beams.finished
    assert (ended.token_ids, ended.end, ended.score) == ((EOS,), RowEnd.EOS, -0.1)


def test_an_end_beyond_the_width_best_does_not_count() -> None:
    beams = search()
    assert moves(beams, top(t1=-0.1, t2=-0.2, t9=-0.3)) == [(0, 1), (0, 2)]
    assert not beams.finished


def test_no_end_before_min_new_tokens() -> None:
    beams = search(min_new_tokens=1)
    assert beams.params.num_candidates == 5
    assert moves(beams, top(t9=-0.1, t1=-0.5, t2=-1.0)) == [(0, 1), (0, 2)]
    assert not beams.finished
    moves(beams, top(t9=-0.1, t3=-1.0), top(t3=-1.0))
    assert [one.token_ids for one in beams.finished] == [(1, EOS)]


@pytest.mark.parametrize(
    ("stopping", "length_penalty", "goes_on"),
    [
        (EarlyStopping.FIRST, 1.0, False),
        (EarlyStopping.HEURISTIC, 0.0, False),  # -0.9 is worse than -0.3
        (EarlyStopping.HEURISTIC, 1.0, False),
        (EarlyStopping.NEVER, 1.0, True),  # -0.9 over 20 tokens is better than -0.3 over 2
        (EarlyStopping.NEVER, 0.0, False),
    ],
)
def test_when_it_ends(stopping: EarlyStopping, length_penalty: float, goes_on: bool) -> None:
    beams = search(new=20, early_stopping=stopping, length_penalty=length_penalty)
    moves(beams, top(t1=-0.1, t2=-0.2, t3=-4.0))
    next_ = moves(beams, top(t9=-0.1, t3=-0.8), top(t9=-0.1, t3=-0.9))
    assert len(beams.finished) == 2
    assert bool(next_) is goes_on
    assert beams.done is not goes_on


def test_length_ends_all_and_the_penalty_ranks() -> None:
    beams = search(new=2, length_penalty=2.0, early_stopping=EarlyStopping.NEVER)
    moves(beams, top(t9=-0.4, t1=-0.5, t2=-1.0))
    assert moves(beams, top(t3=-0.5, t4=-0.6), top(t3=-0.1)) == []
    assert beams.done
    # -1.0 / 4 is better than -0.4 / 1.
    assert [(one.token_ids, one.end) for one in beams.finished] == [
        ((1, 3), RowEnd.LENGTH),
        ((1, 4), RowEnd.LENGTH),
    ]
    assert beams.finished[0].score == pytest.approx(-0.25)
    assert beams.finished[0].logprobs == (-0.5, -0.5)


def test_stop_tokens_end_too_and_widen_what_is_looked_at() -> None:
    beams = search(stop_ids=frozenset({7, 8}))
    assert beams.params.num_candidates == 2 * 4
    moves(beams, top(t7=-0.1, t9=-0.2, t1=-0.5, t2=-1.0))
    assert [one.end for one in beams.finished] == [RowEnd.STOP_TOKEN, RowEnd.EOS]
