"""Weights of a model and of what it was tuned from: a streamed matrix has the numbers of the whole stack."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from jaxsafety.engine import programs
from jaxsafety.linalg import update_spaces
from jaxsafety.rundir import signals
from jaxsafety.study.checkpoints import rows, weights
from jaxsafety.study.checkpoints.weights import Config
from tests.study.checkpoints.conftest import LABELS

# Other algorithms and float32: a share is known to some 1e-5.
TOLERANCE = 1e-4
ALL = Config(attention=True)


def read(folder):
    return pl.concat(pl.read_parquet(piece) for piece in sorted(folder.glob("*.parquet")))


@pytest.fixture(scope="module")
def measured(looked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    weights.measure(looked(folder), ALL)
    return read(folder)


def value(frame, **labels):
    found = frame.filter(pl.col(name).eq_missing(pl.lit(wanted)) for name, wanted in labels.items())
    assert found.height == 1, labels
    return found["value"][0]


def stacks(params, name):
    before, after = (side["blocks"][name.split("/")[0]][name.split("/")[1]] for side in params)
    return np.asarray(before), np.asarray(after - before)


@pytest.mark.parametrize("name", ["mlp/gate", "mlp/down", "attn/k", "attn/o"])
def test_rows_are_those_of_the_whole_stack(measured, params, name):
    frame, part = measured, name.partition("/")[2]
    base, delta = stacks(params, name)
    both = jax.jit(lambda a, b: (update_spaces.both_spaces(a, b), update_spaces.changed_norm(a, b)))
    whole, size = jax.device_get(both(base, delta))
    for layer in range(3):
        for analysis, side in (("output_space", whole.output), ("input_alignment", whole.input)):
            got = {
                metric: value(frame, analysis=analysis, layer=layer, part=part, metric=metric, strength=None)
                for metric in ("null_energy", "total_null_energy", "baseline_norm", "excess", "rank_base", "rank_delta")
            }
            assert got["rank_base"] == side.rank_base[layer] and got["rank_delta"] == side.rank_delta[layer]
            np.testing.assert_allclose(got["null_energy"], side.null_energy[layer], atol=TOLERANCE)
            np.testing.assert_allclose(got["total_null_energy"], side.total_null_energy[layer], atol=TOLERANCE)
            excess = np.nanmean(side.null_norm[layer]) - side.baseline_norm[layer]
            np.testing.assert_allclose(got["excess"], excess, atol=TOLERANCE)
        changed = value(frame, analysis="output_space", layer=layer, part=part, metric="changed_norm")
        np.testing.assert_allclose(changed, size[layer], rtol=1e-5)


def test_the_spectrum_is_that_of_numpy(measured, params):
    frame = measured
    base, delta = (np.asarray(stack, float)[1] for stack in stacks(params, "mlp/up"))
    for metric, matrix in (("value_base", base), ("value_delta", delta)):
        found = frame.filter(analysis="spectrum", metric=metric, layer=1, part="up").sort("strength")
        expected = np.linalg.svd(matrix, compute_uv=False)
        # The Gram matrix refuses what lies below a hundredth of the largest value.
        kept = found["strength"].cast(pl.Int64).to_numpy()
        assert len(kept) >= (expected > 0.02 * expected[0]).sum()
        np.testing.assert_allclose(found["value"], expected[kept], rtol=1e-4)


def test_errors_and_directions_are_written(measured):
    errors = measured.filter(analysis="output_space", metric="error")["value"]
    assert len(errors) == 21 and errors.is_between(0, 1e-5).all()
    assert measured.filter(analysis="output_space", metric="null_norm", layer=0, part="q").height == 3


@pytest.mark.parametrize("method", ["full", "randomized"])
def test_methods_agree(measured, looked, tmp_path, monkeypatch, method):
    # Of one shape, which every method compiles once.
    monkeypatch.setattr(weights, "MATRICES", weights.MATRICES | {"mlp": ("mlp/gate", "mlp/up")})
    weights.measure(looked(tmp_path), Config(method=method, rank=6))
    frame = read(tmp_path)
    for layer, metric in ((0, "null_energy"), (2, "rank_delta"), (1, "stable_rank")):
        labels = {"analysis": "output_space", "part": "gate", "layer": layer, "metric": metric}
        np.testing.assert_allclose(value(frame, **labels), value(measured, **labels), atol=1e-3)


def test_what_a_method_does_not_resolve_is_measured_with_the_next():
    """A randomised decomposition of one triplet holds too little; the Gram matrix cannot see the rest either."""
    drawn = np.random.default_rng(0)
    left, right = (np.linalg.qr(drawn.normal(size=(size, 5)))[0] for size in (20, 30))
    base = np.asarray(left * [1, 3e-3, 3e-3, 3e-3, 3e-3] @ right.T, np.float32)
    tuned = base + drawn.normal(size=base.shape).astype(np.float32)
    measure = weights.measurer(Config(method="randomized", rank=1, energy=1 - 2e-5))
    spaces = measure(base, tuned)["spaces"]
    assert spaces.output.rank_base[0] == 3 and spaces.output.rank_delta[0] > 1
    assert spaces.delta_values.shape[-1] == 20


def test_equal_matrices_have_no_shares(params):
    same = params[0]["blocks"]["mlp"]["up"][0]
    found = weights.measurer(ALL)(same, same)
    assert found["changed_norm"] == 0 and np.isnan(found["spaces"].output.null_energy[0])


def test_rows_have_the_labels_of_their_model(measured):
    assert measured.select(*LABELS).unique().to_dicts() == [LABELS]
    for name in ("revision", "method", "lr_name", "seed", "step"):
        assert measured[name].null_count() == 0, name


def test_a_model_that_begins_with_none_has_no_update(looked, tmp_path):
    weights.measure(looked(tmp_path / "none", based=False), ALL)
    assert not (tmp_path / "none").exists()


def test_a_run_goes_on_where_it_was_killed(measured, looked, tmp_path, monkeypatch):
    """Every piece is kept; what is there is not measured again, and the end is that of a run in one go."""
    written, real = [], rows.write

    def stop_after(count):
        def write(path, frame):
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(path.name)
            real(path, frame)

        return write

    for count in (4, 5, 100):
        monkeypatch.setattr(rows, "write", stop_after(count))
        try:
            weights.measure(looked(tmp_path), ALL)
        except KeyboardInterrupt:
            assert len(list(tmp_path.iterdir())) == count
    assert len(written) == len(set(written)) == 21
    assert read(tmp_path).equals(measured)


def test_a_signal_stops_behind_a_matrix_that_is_kept(looked, tmp_path, monkeypatch):
    def stop(where):
        raise signals.Stopped(15, where)

    monkeypatch.setattr(signals, "check", stop)
    for count in (1, 2):
        with pytest.raises(signals.Stopped, match=r"after mlp/(gate|up) of layer 0"):
            weights.measure(looked(tmp_path), ALL)
        assert len(list(tmp_path.iterdir())) == count


def test_a_matrix_that_is_too_large_is_refused_before_it_is_read(looked, tmp_path, monkeypatch):
    monkeypatch.setattr(programs.memory, "available", lambda: 1000)
    # Of options that no other test has: a program is looked at once.
    with pytest.raises(ValueError, match=r"analysis of a matrix of 32 x 48 needs .* GiB, and the device has"):
        weights.measure(looked(tmp_path), Config(energy=0.7))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, "energy must be > 0 and <= 1 and finite, got 0.0"),
        ({"rank": 0}, "rank must be >= 1 and finite, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        replace(Config(), **options)


@pytest.mark.slow
def test_jitted_is_eager(params, key):
    before, after = (jnp.asarray(side["blocks"]["mlp"]["up"][0]) for side in params)
    options = {"energy": 0.9, "method": "full", "rank": 4}
    eager = weights.measure_matrix(before, after, **options)
    jitted = jax.jit(lambda a, b: weights.measure_matrix(a, b, **options))(before, after)
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
