"""Grammars of rows: masks, replay, forks, failures; and a model runner that follows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from headgate.proto.messages import Fork, RowEnd, StepResult
from headgate.shard.distributed import single_group
from headgate.shard.models.registry import load_model
from headgate.shard.sampling.grammar import ConstrainedRow, GrammarMasks, RowGrammar
from tests.checkpoints import IM_END, VOCAB_SIZE, write_tokenizer
from tests.unit.test_model_runner import Driver, make_runner, row

WORD = LLMatcher.grammar_from_regex("[a-c]{2,5}")
FORKED = LLMatcher.grammar_from_regex("abcd|abxy")


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> GrammarMasks:
    """Token n is byte n."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return GrammarMasks(str(path), VOCAB_SIZE, [IM_END], num_threads=2)


def constrained(slot: int, grammar: RowGrammar, output: bytes) -> ConstrainedRow:
    return ConstrainedRow(slot, grammar, np.frombuffer(output, np.uint8).astype(np.int32))


def allowed(masks: GrammarMasks, grammar: RowGrammar, output: bytes) -> list[int]:
    mask = masks.begin([constrained(3, grammar, output)])().allowed[3]
    assert mask.shape == (VOCAB_SIZE,) and mask.dtype == np.bool_
    return np.flatnonzero(mask).tolist()


def test_tokens_that_the_grammar_leaves(masks: GrammarMasks) -> None:
    grammar = RowGrammar(WORD)
    assert allowed(masks, grammar, b"") == list(b"abc")
    assert allowed(masks, grammar, b"a") == list(b"abc")
    assert allowed(masks, grammar, b"ab") == [*b"abc", IM_END]  # the end, where it is complete
    assert allowed(masks, grammar, b"abcab") == [IM_END]  # nothing else, where it can't go on


def test_a_grammar_is_read_anew_from_the_tokens(masks: GrammarMasks) -> None:
    growing = RowGrammar(WORD)
    for length in range(5):
        output = b"cabba"[:length]
        assert allowed(masks, growing, output) == allowed(masks, RowGrammar(WORD), output)


def test_a_new_row_begins_anew_whatever_others_read(masks: GrammarMasks) -> None:
    for output in (b"abcab", b"zz", b"a", b""):
        masks.begin([constrained(1, RowGrammar(WORD), output)])()
        assert allowed(masks, RowGrammar(WORD), b"") == list(b"abc")
        assert allowed(masks, RowGrammar(WORD), b"cb") == [*b"abc", IM_END]


def test_what_others_learnt_fails_no_row(masks: GrammarMasks) -> None:
    other = masks.prepare(LLMatcher.grammar_from_regex("z")).result()
    masks._learnt[WORD] = other.deep_copy(), 1  # as good as full tables: the row cannot go on
    growing = RowGrammar(WORD)
    assert allowed(masks, growing, b"ab") == [*b"abc", IM_END]
    assert allowed(masks, growing, b"abcab") == [IM_END]


@pytest.mark.parametrize("shared", [0, 2, 3])
def test_a_fork_goes_its_own_way(masks: GrammarMasks, shared: int) -> None:
    parent = RowGrammar(FORKED)
    assert allowed(masks, parent, b"abc") == [*b"d"]
    child = parent.fork(shared)
    if shared < 3:
        assert allowed(masks, child, b"ab") == [*b"cx"]
        assert allowed(masks, child, b"abx") == [*b"y"]
    else:
        assert allowed(masks, child, b"abc") == [*b"d"]
    assert allowed(masks, parent, b"abcd") == [IM_END]
    assert allowed(masks, RowGrammar(FORKED).fork(2), b"ab") == [*b"cx"]  # of one never read


def test_many_rows_at_once_and_failures_of_some(masks: GrammarMasks) -> None:
    rows = [constrained(slot, RowGrammar(WORD), b"ab") for slot in range(20)]
    rows.append(constrained(20, RowGrammar(LLMatcher.grammar_from_regex("[")), b""))
    rows.append(constrained(21, RowGrammar(WORD), b"zz"))  # not what the grammar allows
    found = masks.begin(rows)()
    assert sorted(found.allowed) == list(range(20)) and sorted(found.failures) == [20, 21]
    assert all((mask == found.allowed[0]).all() for mask in found.allowed.values())
    assert "unclosed" in found.failures[20] and "satisfy" in found.failures[21]
    assert masks.begin([])().allowed == {}


def test_rows_under_way_are_not_compiled_again(
    masks: GrammarMasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many grammars there are: more than are kept for rows to come."""
    compiled: list[str] = []
    compile_one = masks._compile
    monkeypatch.setattr(masks, "_compile", lambda s: (compiled.append(s), compile_one(s))[1])
    sources = [LLMatcher.grammar_from_regex(f"x{number}[ab]+") for number in range(70)]
    grammars = [RowGrammar(source) for source in sources]
    for output in (b"", b"x"):
        found = masks.begin([constrained(*row, output) for row in enumerate(grammars)])()
        assert len(found.allowed) == len(sources)
    masks._compiler.submit(lambda: None).result()  # after all that was asked for before
    assert sorted(compiled) == sorted(sources)
    assert masks._learnt.keys() <= masks._compiled.keys()


# ------------------------------------------------------------------ the runner


@pytest.fixture
def step(tiny_llama: Path) -> Driver:
    model = load_model(tiny_llama, dtype="float32", device="cpu", group=single_group())
    return Driver(make_runner(model, model_path=str(tiny_llama)))


def text_of(results: list[StepResult], row_id: int) -> bytes:
    """The row's tokens but for the end of sequence."""
    pairs = [pair for r in results for pair in zip(r.rows, r.token_ids, strict=True)]
    return bytes(token for id_, token in pairs if id_ == row_id and token < 256)


def run(step: Driver, first: dict[str, Any], row_id: int = 1, steps: int = 12) -> list[StepResult]:
    """The first plan, and then others that know nothing of its tokens."""
    return [step(**first)] + [step(rows=[row_id], counts=[1]) for _ in range(steps)]


def ends_of(results: list[StepResult]) -> list[RowEnd]:
    return [end for result in results for end in result.ends]


PROMPT = list(b"say a word")


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.3}]
)
def test_an_answer_is_in_the_form_and_ends_with_it(step: Driver, sampling: dict[str, Any]) -> None:
    new = row(1, PROMPT, range(4), grammar=WORD, **sampling)
    results = run(step, dict(new_rows=[new], rows=[1], counts=[len(PROMPT)]))
    text = text_of(results, 1)
    assert 2 <= len(text) <= 5 and set(text) <= set(b"abc")
    ends = ends_of(results)
    assert ends == [RowEnd.NONE] * len(text) + [RowEnd.EOS]  # and dead in the plans after


def test_logprobs_are_of_the_models_own_distribution(step: Driver) -> None:
    plain = row(1, PROMPT, range(4), logprobs=True, top_n_tokens=259)
    bound = row(2, PROMPT, range(4, 8), logprobs=True, top_n_tokens=259, grammar=WORD)
    result = step(new_rows=[plain, bound], rows=[1, 2], counts=[len(PROMPT)] * 2)
    free, of = (dict(zip(top.ids, top.logprobs, strict=True)) for top in result.top)
    # Products of the reference kernels don't give two rows alike the same bits.
    assert of == pytest.approx(free, abs=1e-5)
    assert result.logprobs[1] == pytest.approx(of[result.token_ids[1]], abs=1e-6)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_a_row_sent_anew_goes_on_in_its_grammar(step: Driver, keep: int) -> None:
    grammar = LLMatcher.grammar_from_regex("[a-z]{8}!")
    sampling = {"temperature": 2.0, "seed": 8, "grammar": grammar}
    new = row(1, PROMPT, range(6), **sampling)
    whole = text_of(run(step, dict(new_rows=[new], rows=[1], counts=[len(PROMPT)])), 1)
    assert len(whole) == 9 and whole.endswith(b"!")
    again = row(1, PROMPT, range(8, 14), output_ids=list(whole[:keep]), **sampling)
    first = dict(removed=[1], new_rows=[again], rows=[1], counts=[len(PROMPT) + keep])
    assert whole[:keep] + text_of(run(step, first), 1) == whole


def test_forked_rows_follow_the_grammar(step: Driver) -> None:
    sampling = {"temperature": 3.0, "seed": 5, "grammar": LLMatcher.grammar_from_regex("[a-p]{6}")}
    step(new_rows=[row(1, PROMPT, range(6), **sampling)], rows=[1], counts=[len(PROMPT)])
    # The prompt and a token; the last block, of which the child fills its own, is copied.
    fork = Fork(1, 2, sample_index=1, block_ids=[0, 1, 8, 9, 10], num_tokens=len(PROMPT) + 1)
    results = [step(forks=[fork], copies=[(2, 8)], rows=[1, 2], counts=[1, 1])]
    results += [step(rows=[1, 2], counts=[1, 1]) for _ in range(6)]
    texts = [text_of(results, row_id) for row_id in (1, 2)]
    assert all(len(text) == 5 and set(text) <= set(b"abcdefghijklmnop") for text in texts)
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("sampling", "length"),
    [
        ({"min_new_tokens": 4}, range(4, 6)),  # as far as the grammar goes
        ({"min_new_tokens": 9}, range(5, 6)),  # no further
        ({"ignore_eos": True}, range(5, 6)),
        ({"ignore_eos": True, "min_new_tokens": 9}, range(5, 6)),
    ],
)
def test_lengths_within_the_grammar(step: Driver, sampling: dict[str, Any], length: range) -> None:
    greedy = run(
        step,
        dict(
            new_rows=[row(1, PROMPT, range(4), grammar=WORD, **sampling)],
            rows=[1],
            counts=[len(PROMPT)],
        ),
    )
    assert len(text_of(greedy, 1)) in length
    assert ends_of(greedy)[-1] is RowEnd.EOS


def test_stop_tokens_wait_for_the_least_length_where_there_is_something_else(step: Driver) -> None:
    sampling = {"min_new_tokens": 3, "stop_token_ids": tuple(b"ab")}
    new = row(
        1, PROMPT, range(6), grammar=LLMatcher.grammar_from_regex("[a-c]{3}[ab]+"), **sampling
    )
    results = run(step, dict(new_rows=[new], rows=[1], counts=[len(PROMPT)]))
    assert text_of(results, 1)[:3] == b"ccc" and len(text_of(results, 1)) == 4
    assert ends_of(results)[-1] is RowEnd.STOP_TOKEN


def test_a_grammar_is_compiled_before_its_row_comes(step: Driver) -> None:
    runner = step.runner
    for source in (WORD, LLMatcher.grammar_from_regex("[")):  # what fails, fails with its row
        runner.prepare_grammar(source)
        assert runner._grammars.prepare(source).done()
    assert runner._grammars.prepare(WORD) is runner._grammars.prepare(WORD)


def test_a_row_that_cannot_go_on_fails_alone(step: Driver) -> None:
    broken = row(2, PROMPT, range(4, 8), grammar=LLMatcher.grammar_from_lark("start: nothing"))
    good = row(1, PROMPT, range(4), grammar=WORD)
    counts = [len(PROMPT)] * 2
    result = step(new_rows=[broken, good], rows=[2, 1], counts=counts)
    assert result.ends == [RowEnd.FAILED, RowEnd.NONE]
    assert list(result.failures) == [2] and "nothing" in result.failures[2]
    result = step(rows=[2, 1], counts=[1, 1])
    assert result.rows == [1] and result.failures == {}
