"""RoPE as configs spell it, and the choices made where a published kind depends on the length.

That the angles are Transformers' is tested in tests/parity.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headgate.shard.errors import ModelError
from headgate.shard.layers.rotary import cos_sin_table, inverse_frequencies
from headgate.shard.rope_config import RopeConfig, read_rope_config


def test_both_spellings_mean_the_same() -> None:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    numbers["original_max_position_embeddings"] = 8192
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **numbers}}
    old = {"rope_scaling": {"rope_type": "llama3", **numbers}, "rope_theta": 500000.0}
    older = {"rope_scaling": {"type": "llama3", **numbers}, "rope_theta": 500000.0}
    configs = [
        read_rope_config({"max_position_embeddings": 131072, **c}) for c in (new, old, older)
    ]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].kind == "llama3" and configs[0].original_max_position_embeddings == 8192


@pytest.mark.parametrize(
    "config", [{}, {"rope_scaling": None}, {"rope_scaling": {"type": "default"}}, {
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}]
)  # fmt: skip
def test_default(config: dict[str, Any]) -> None:
    rope = read_rope_config(config)
    assert (rope.kind, rope.theta) == ("default", 10000.0)


def test_su_is_longrope() -> None:
    scaling = {"type": "su", "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    config = {
        "rope_scaling": scaling,
        "max_position_embeddings": 400,
        "original_max_position_embeddings": 100,
    }
    rope = read_rope_config(config)
    assert (rope.kind, rope.factor, rope.long_factor) == ("longrope", 4.0, (2.0, 3.0))


@pytest.mark.parametrize(
    ("scaling", "factor", "expected"),
    [
        ("linear", 4.0, ("linear", 4.0)),
        ("dynamic", 0.0, ("dynamic", 1.0)),
        ("", 2.0, ("linear", 2.0)),
    ],
)
def test_override(scaling: str, factor: float, expected: tuple[str, float]) -> None:
    config = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 7.0, "factor": 9.0}}
    rope = read_rope_config(config, scaling, factor)
    assert (rope.kind, rope.factor) == expected
    assert rope.theta == 7.0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "axial"}, "RoPE of type 'axial' is not supported"),
        ({"rope_type": "linear"}, "RoPE of type 'linear' needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
        ({"full_attention": {"rope_type": "default"}}, "each layer type its own RoPE"),
    ],
)
def test_unfit(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_rope_config({"rope_parameters": parameters})


def test_partial_rotation() -> None:
    rope = RopeConfig(partial_rotary_factor=0.5)
    assert cos_sin_table(rope, 16, 10).shape == (10, 8)
    half, _ = inverse_frequencies(rope, 16, 10)
    whole, _ = inverse_frequencies(RopeConfig(), 8, 10)
    assert torch.equal(half, whole)


def test_odd_number_of_dimensions() -> None:
    with pytest.raises(ModelError, match="RoPE over 7 dimensions"):
        inverse_frequencies(RopeConfig(), 7, 10)


def test_dynamic_stretches_for_the_longest_sequence_only() -> None:
    rope = RopeConfig(kind="dynamic", factor=2.0, max_position_embeddings=64)
    plain = cos_sin_table(RopeConfig(max_position_embeddings=64), 16, 64)
    assert torch.equal(cos_sin_table(rope, 16, 64), plain)
    stretched, _ = inverse_frequencies(rope, 16, 128)
    # Twice the length by a factor of 2: the base grows by 2 * 2 - 1 to the power 16/14.
    expected, _ = inverse_frequencies(RopeConfig(theta=10000.0 * 3 ** (16 / 14)), 16, 64)
    torch.testing.assert_close(stretched, expected)


def test_longrope_chooses_by_the_longest_sequence() -> None:
    rope = RopeConfig(
        kind="longrope",
        factor=4.0,
        original_max_position_embeddings=32,
        short_factor=(1.0, 1.0, 1.0, 1.0),
        long_factor=(2.0, 2.0, 2.0, 2.0),
    )
    short, scale = inverse_frequencies(rope, 8, 32)
    long, _ = inverse_frequencies(rope, 8, 33)
    torch.testing.assert_close(short, long * 2)
    assert scale == pytest.approx(1.4**0.5)  # 1 + ln 4 / ln 32


def test_longrope_with_the_wrong_number_of_factors() -> None:
    rope = RopeConfig(kind="longrope", short_factor=(1.0,), long_factor=(1.0,))
    with pytest.raises(ModelError, match=r"has 1 factors in config\.json, but 4 freq"):
        inverse_frequencies(rope, 8, 32)
