"""Whose prompts a probe is learned from, and from which safe ones it tells which others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.analysis import probe
from jaxsafety.types import Seen, View

L, B, D = 2, 40, 6
CONDITIONS = ("safe", "unsafe", "cipher_safe", "cipher")
# Where conditions lie: unsafe ones along one axis, ciphered ones along another.
AXES = {"safe": (0, 0), "unsafe": (5, 0), "cipher_safe": (0, 5), "cipher": (0, 5)}


def seen(names, seed, axes=AXES):
    drawn = np.random.default_rng(seed).normal(size=(L, len(names), B, D))
    for place, name in enumerate(names):
        drawn[:, place, :, :2] += axes[name]
    rows = jnp.asarray(drawn, jnp.float32)
    return {probe.RESIDUAL: Seen(rows, rows)}


def areas(axes):
    view = View(
        None, None, None, conditions=CONDITIONS, seen=seen(CONDITIONS, 0, axes), held=seen(CONDITIONS[:2], 1, axes)
    )
    found = probe.measure(view, probe.Config(), key=jax.random.key(0))[("auc", "asked learned layer")]
    assert found.shape == (3, 2, L)
    return {
        name: {part: np.asarray(values) for part, values in zip(probe.LEARNED, rows, strict=True)}
        for name, rows in zip(CONDITIONS[1:], found, strict=True)
    }


def test_what_looks_like_unsafe_prompts_is_seen_by_a_plain_probe():
    found = areas(AXES)
    assert found["unsafe"]["plain"].min() > 0.99 and found["unsafe"]["own"].min() > 0.99
    # Harm in the cipher lies where harmless prompts in it do: no probe tells them.
    for part in probe.LEARNED:
        assert np.all(np.abs(found["cipher"][part] - 0.5) < 0.3)
    # Nothing says from which prompts safe ones should be told.
    assert np.isnan(found["cipher_safe"]["plain"]).all() and np.isnan(found["cipher_safe"]["own"]).all()


def test_harm_along_an_axis_of_its_own_is_seen_by_a_probe_that_has_met_it():
    found = areas(AXES | {"cipher": (0, 10)})
    assert found["cipher"]["own"].min() > 0.99
    assert np.all(np.abs(found["cipher"]["plain"] - 0.5) < 0.3)


def test_the_halves_of_a_probe_share_no_text():
    """Safe and unsafe prompts of one text that look the same: no half may have met the other's."""
    drawn, other = (np.random.default_rng(seed).normal(size=(1, count, 41, 3)) for seed, count in ((4, 1), (5, 2)))
    both = {probe.RESIDUAL: Seen(jnp.asarray(drawn + 0.01 * other, jnp.float32), None)}
    view = View(None, None, None, conditions=CONDITIONS[:2], seen=both, held=both)
    found = probe.measure(view, probe.Config(), key=jax.random.key(0))[("auc", "asked learned layer")]
    assert abs(found[0, 1, 0] - 0.5) < 0.25


def test_the_halves_of_a_probe_share_no_prompt():
    """Labels by chance: a probe that had seen what it is asked about would tell them."""
    many = np.random.default_rng(2).normal(size=(1, 2, B, 2 * B))
    rows = {probe.RESIDUAL: Seen(jnp.asarray(many, jnp.float32), None)}
    view = View(None, None, None, conditions=CONDITIONS[:2], seen=rows, held=rows)
    found = probe.measure(view, probe.Config(ridge=1e-3), key=jax.random.key(0))[("auc", "asked learned layer")]
    assert found[0, 0, 0] == pytest.approx(1) and abs(found[0, 1, 0] - 0.5) < 0.25
