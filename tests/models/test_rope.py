"""Rotary frequencies against the papers' formulas, channel by channel in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.models import rope
from jaxsafety.models.rope import Rope

F32 = 2e-7  # relative: one rounding to float32
TRACED = 2e-6  # relative: a logarithm and an exponential in float32
TABLE = 2e-5  # sines of angles up to 200 whose float32 is off by half an ulp, 8e-6

LLAMA3 = Rope(500_000.0, "llama3", factor=8.0, original_tokens=8192)
LENGTHS = jnp.asarray([5, 64, 100], jnp.int32)


def _frequencies(scaling, width=8):
    return np.asarray(rope.frequencies(scaling, width=width, lengths=LENGTHS), np.float64)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 4.0)])
def test_plain_and_linear_closed_form(scaling, factor):
    got = _frequencies(Rope(100.0, scaling, factor=factor))
    expected = [[100.0 ** (-2 * i / 8) / factor for i in range(4)]]
    np.testing.assert_allclose(got, expected, rtol=F32)


def test_without_scaling_the_factor_is_not_looked_at():
    np.testing.assert_array_equal(_frequencies(Rope(factor=3.0)), _frequencies(Rope()))


def test_dynamic_scaling_leaves_short_sequences_alone_and_raises_the_base_of_long_ones():
    got = _frequencies(Rope(100.0, "dynamic", factor=2.0, original_tokens=64))
    for row, length in zip(got, LENGTHS.tolist(), strict=True):
        base = 100.0 if length <= 64 else 100.0 * (2.0 * length / 64 - 1.0) ** (8 / 6)
        np.testing.assert_allclose(row, [base ** (-2 * i / 8) for i in range(4)], rtol=TRACED)
    np.testing.assert_array_equal(got[0], got[1])
    assert got[2, 3] < got[1, 3]


def test_llama3_keeps_fast_channels_divides_slow_ones_and_blends_between():
    got, kinds = _frequencies(LLAMA3, width=128)[0], set()
    for i in range(64):
        plain = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            kind, expected = "fast", plain
        elif wavelength > 8192 / 1:
            kind, expected = "slow", plain / 8
        else:
            share = (8192 / wavelength - 1) / (4 - 1)
            kind, expected = "between", (1 - share) * plain / 8 + share * plain
        kinds.add(kind)
        assert got[i] == pytest.approx(expected, rel=F32), (i, kind)
    assert kinds == {"fast", "slow", "between"}


@pytest.mark.parametrize("scaling", [Rope(), LLAMA3, Rope(scaling="dynamic", factor=2.0, original_tokens=64)])
def test_table_is_cosine_and_sine_of_each_rows_own_positions(scaling):
    positions = jnp.asarray([[0, 0, 1], [5, 63, 200], [7, 8, 9]], jnp.int32)
    got = jax.jit(lambda p: rope.table_at(scaling, positions=p, lengths=LENGTHS, width=8))(positions)
    speeds = np.broadcast_to(_frequencies(scaling), (3, 4))
    for b, t, i in np.ndindex(3, 3, 4):
        angle = int(positions[b, t]) * speeds[b, i]
        np.testing.assert_allclose(got[:, b, t, i], [math.cos(angle), math.sin(angle)], atol=TABLE)


def test_yarn_leaves_the_quick_channels_divides_the_slow_ones_and_scales_all():
    """Of a Qwen3's sizes: 32 turns within the first context and more are left, fewer than one are divided."""
    longer = Rope(1e6, "yarn", 4.0, 1.0, 32.0, 32768, 1.5)
    found = np.asarray(rope.frequencies(longer, width=128, lengths=jnp.ones(1, jnp.int32))[0], float)
    plain = 1e6 ** (-np.arange(64) / 64)
    turns = 32768 * plain / (2 * math.pi)
    np.testing.assert_allclose(found[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(found[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    between = (turns > 1.3) & (turns < 28)
    assert (found[between] < plain[between]).all() and (found[between] > plain[between] / 4).all()
    table = rope.table_at(longer, positions=jnp.arange(3)[None], lengths=jnp.full(1, 3), width=128)
    np.testing.assert_allclose(np.sum(np.asarray(table, float) ** 2, axis=0), 1.5**2, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"scaling": "longrope"},
            "unknown rope scaling 'longrope': expected one of none, linear, dynamic, llama3, yarn",
        ),
        ({"amplitude": 0.0}, "rope.amplitude: got 0.0, expected a number greater than 0"),
        ({"scaling": "lama3"}, "did you mean 'llama3'"),
        ({"base": 0.0}, "rope.base: got 0.0, expected a number greater than 0"),
        ({"base": math.nan}, "rope.base: got nan"),
        ({"factor": 0.5}, "rope.factor: got 0.5, expected a number of at least 1"),
        ({"low_frequency": 4.0}, "rope.high_frequency: got 4.0, expected a number greater than 4.0"),
        ({"low_frequency": -1.0}, "rope.low_frequency: got -1.0"),
        ({"original_tokens": 0}, "rope.original_tokens: got 0, expected an integer of at least 1"),
    ],
)
def test_bad_scalings_are_named(unchecked, overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Rope(), **overrides)
