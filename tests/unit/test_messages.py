"""Step messages survive the wire whatever is in them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.proto import shard_pb2
from headgate.proto.messages import (
    Fork,
    NewRow,
    PooledStates,
    PromptLogprobs,
    RowEnd,
    RowSampling,
    StepPlan,
    StepResult,
    TopTokens,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
    pack_floats,
    pack_ids,
    unpack_floats,
    unpack_ids,
)

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
float32 = st.floats(width=32, allow_nan=False)
ids = st.lists(uint32, max_size=5)

samplings = st.builds(
    RowSampling,
    max_new_tokens=uint32,
    temperature=float32,
    top_k=uint32,
    top_p=float32,
    typical_p=float32,
    min_p=float32,
    repetition_penalty=float32,
    frequency_penalty=float32,
    presence_penalty=float32,
    watermark_gamma=float32,
    watermark_delta=float32,
    seed=uint64,
    sample_index=uint32,
    min_new_tokens=uint32,
    ignore_eos=st.booleans(),
    stop_token_ids=st.tuples(uint32, uint32) | st.just(()),
    logprobs=st.booleans(),
    top_n_tokens=uint32,
    prompt_logprobs=st.booleans(),
    prompt_top_n_tokens=uint32,
    logit_bias=st.lists(st.tuples(uint32, float32), max_size=3).map(tuple),
    allowed_token_ids=ids.map(tuple),
    bad_words=st.lists(ids.map(tuple), max_size=3).map(tuple),
)
new_rows = st.builds(
    NewRow,
    id=uint32,
    prompt_ids=ids,
    sampling=samplings,
    output_ids=ids,
    num_computed_tokens=uint32,
    block_ids=ids,
    lockstep=st.booleans(),
    adapter_id=st.text(max_size=5),
)
plans = st.builds(
    StepPlan,
    epoch=uint64,
    sequence=uint64,
    rows=ids,
    counts=ids,
    new_rows=st.lists(new_rows, max_size=3),
    removed=ids,
    block_rows=ids,
    block_ids=ids,
    copies=st.lists(st.tuples(uint32, uint32), max_size=3),
    forks=st.lists(
        st.builds(
            Fork,
            parent=uint32,
            child=uint32,
            sample_index=uint32,
            block_ids=ids,
            num_tokens=uint32,
            token_ids=ids,
        ),
        max_size=2,
    ),
    choices=st.lists(st.tuples(uint32, uint32), max_size=3),
    reset=st.booleans(),
)


@st.composite
def top_tokens(draw: st.DrawFn) -> TopTokens:
    count = draw(st.integers(0, 4))
    return TopTokens(
        draw(st.lists(uint32, min_size=count, max_size=count)),
        draw(st.lists(float32, min_size=count, max_size=count)),
    )


prompt_logprobs = st.builds(
    PromptLogprobs,
    row=uint32,
    start=uint32,
    logprobs=st.lists(float32, max_size=4),
    top=st.lists(top_tokens(), max_size=3),
)
pooled_states = st.builds(
    PooledStates,
    row=uint32,
    start=uint32,
    stop=uint32,
    sums=st.lists(st.floats(allow_nan=False), max_size=4),
)
results = st.builds(
    StepResult,
    epoch=uint64,
    sequence=uint64,
    rows=ids,
    token_ids=ids,
    logprobs=st.lists(float32, max_size=4),
    ends=st.lists(st.sampled_from(RowEnd), max_size=4),
    top=st.lists(top_tokens(), max_size=3),
    prompt_logprobs=st.lists(prompt_logprobs, max_size=2),
    pooled=st.lists(pooled_states, max_size=2),
    refused=st.text(max_size=9),
    forward_ns=uint64,
    total_ns=uint64,
)


def listed(message: StepPlan | StepResult) -> dict[str, Any]:
    """Its fields; an empty sequence may come back as a tuple."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


@settings(max_examples=60, deadline=None)
@given(plans)
def test_plans_survive_the_wire(plan: StepPlan) -> None:
    data = encode_plan(plan).SerializeToString()
    assert listed(decode_plan(shard_pb2.StepPlan.FromString(data))) == listed(plan)


@settings(max_examples=60, deadline=None)
@given(results)
def test_results_survive_the_wire(result: StepResult) -> None:
    data = encode_result(result).SerializeToString()
    assert listed(decode_result(shard_pb2.StepResult.FromString(data))) == listed(result)


@settings(max_examples=30, deadline=None)
@given(ids, st.lists(float32, max_size=5))
def test_packed_numbers(numbers: list[int], values: list[float]) -> None:
    assert unpack_ids(pack_ids(numbers)) == numbers
    assert unpack_floats(pack_floats(values)) == values


def test_packing_is_little_endian() -> None:
    assert pack_ids([1, 258]) == b"\x01\x00\x00\x00\x02\x01\x00\x00"
    assert pack_floats([1.0]) == b"\x00\x00\x80\x3f"


def test_numbers_that_do_not_fit_are_errors() -> None:
    for number in (-1, 2**32):
        with pytest.raises(OverflowError):
            pack_ids([number])


def test_torn_numbers_are_errors() -> None:
    with pytest.raises(ValueError):
        unpack_ids(b"\x01\x00\x00")
    with pytest.raises(ValueError):
        decode_plan(shard_pb2.StepPlan(copy_from=pack_ids([1, 2]), copy_to=pack_ids([3])))


def test_every_field_of_a_message_is_in_the_schema() -> None:
    names = {field.name for field in fields(RowSampling)} - {"logit_bias", "bad_words"}
    packed = {"bias_ids", "bias_values", "bad_word_ids", "bad_word_counts"}
    assert names | packed == set(shard_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    assert {field.name for field in fields(NewRow)} == set(
        shard_pb2.NewRow.DESCRIPTOR.fields_by_name
    )
    assert [end.name for end in RowEnd] == [
        name.removeprefix("ROW_END_")
        for name in shard_pb2.RowEnd.keys()  # noqa: SIM118
    ]


def test_num_tokens() -> None:
    assert StepPlan(1, 1, rows=[1, 2], counts=[3, 4]).num_tokens == 7
