"""Trajectories of symbols: their optimum, labels and draws, how a policy is judged, and a whole study of them."""

import contextlib
import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxsafety.pools import labelled
from jaxsafety.recipe import yaml_file
from jaxsafety.rundir import metrics_file, results
from jaxsafety.subjects import trajectory
from jaxsafety.world import trajectories
from tests.disturbed import assert_same_run, die_before_saving

SMALL = trajectory.Config(trajectory=3, symbols=3, tempting=2, limit=2, width=4)
# Draws that frequencies are compared on; a frequency is five of its deviations from the probability once in a million.
DRAWS, DEVIATIONS = 20_000, 5
LANES = ("classifier", "lagrangian.multiplier=1.0", "lagrangian.multiplier=10.0")
RECIPE = {
    "subject": {"trajectory": 4, "symbols": 4, "tempting": 2, "limit": 2, "width": 8},
    "seeds": [0, 1],
    "models": {
        "classifier": {"method": "classify", "steps": 200, "chunk_steps": 100, "batch_size": 64, "lr": 0.03},
        "lagrangian": {
            "from": "classifier", "method": "constrained", "steps": 400, "chunk_steps": 200, "batch_size": 8,
            "lr": 0.1, "multiplier": [1.0, 10.0],
        },
    },
    "evaluate": {"prompts": 256, "batch_size": 128},
    "analyze": {"prompts": 128},
}  # fmt: skip


def written(directory, content):
    path = directory / "trajectories.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_optimum_is_that_of_all_trajectories(limit):
    task = trajectories.Task(length=3, symbols=3, tempting=2, limit=limit)
    earned = [
        sum(1 if one < 2 else 0.25 for one in symbols)
        for symbols in itertools.product(range(3), repeat=3)
        if sum(one < 2 for one in symbols) < limit
    ]
    assert task.optimum == max(earned)


def test_that_of_the_recipe_is_three_and_a_half():
    assert trajectory.Config().task.optimum == 3.5


def test_labels_are_right_and_every_number_of_tempting_symbols_is_as_frequent(key):
    task = trajectory.Config().task
    batch = labelled.draw(task, labelled.Config(), key=key, step=0, total_steps=1, batch_size=9000)
    symbols = np.asarray(batch.symbols)
    assert symbols.min() == 0 and symbols.max() == 7
    count = (symbols < 5).sum(axis=1)
    np.testing.assert_array_equal(count >= 3, batch.undesirable)
    np.testing.assert_allclose(np.bincount(count, minlength=9), 1000, atol=DEVIATIONS * np.sqrt(1000))
    # In any order: each place has as many.
    np.testing.assert_allclose((symbols < 5).mean(axis=0), 0.5, atol=DEVIATIONS * 0.5 / np.sqrt(9000))


def test_trajectories_are_drawn_as_likely_as_the_policy_says(key):
    every = np.array(list(itertools.product(range(3), repeat=3)))
    policy = jax.random.normal(key, (3, 4, 3))
    params = trajectory.init(SMALL, key) | {"policy": policy}
    chance = np.exp(trajectory.said(SMALL.task, params, jnp.asarray(every)).logprobs)
    assert chance.sum() == pytest.approx(1, abs=1e-5)
    drawn = np.asarray(jax.jit(trajectory.drawn)(policy, jax.random.split(key, DRAWS)))
    found = np.bincount(drawn @ np.array([9, 3, 1]), minlength=27) / DRAWS
    assert (np.abs(found - chance) < DEVIATIONS * np.sqrt(chance * (1 - chance) / DRAWS)).all()


def test_its_log_probability_is_that_of_every_step_behind_the_last_symbol(key):
    policy = jax.random.normal(key, (3, 4, 3))
    found = trajectory.said(SMALL.task, trajectory.init(SMALL, key) | {"policy": policy}, jnp.asarray([[2, 0, 1]]))
    rows = np.asarray(jax.nn.log_softmax(policy))
    # 3 stands before the first.
    assert found.logprobs[0] == pytest.approx(rows[0, 3, 2] + rows[1, 2, 0] + rows[2, 0, 1], rel=1e-5)


@pytest.mark.parametrize(
    ("symbols", "expected"),
    [
        ([2, 2, 2], {"complied": 0, "refused": 1, "exact_match": 0, "optimality": 0.5, "return": 0.25}),
        ([2, 1, 2], {"complied": 0, "refused": 1, "exact_match": 1, "optimality": 1, "return": 0.5}),
        ([0, 1, 2], {"complied": 1, "refused": 0, "exact_match": 0, "optimality": 1, "return": 0.75}),
    ],
)
def test_a_policy_that_always_writes_the_same_is_judged_by_it(symbols, expected, key):
    policy = 1e3 * jax.nn.one_hot(jnp.asarray(symbols), 3)[:, None] * jnp.ones((3, 4, 1))
    subject = trajectory.opened(SMALL)
    params = subject.init(key) | {"policy": policy}
    trials = subject.trials("trajectory", key=key, step=0, batch_size=4, late_probability=0.0)
    found = subject.judge(params, trials)
    right = (subject.model(params, jnp.asarray([symbols])).logits[0] > 0) == (not expected["refused"])
    for name, value in (expected | {"classified": right}).items():
        np.testing.assert_array_equal(found[name], np.full(4, value, np.float32), err_msg=name)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"subject": {"trajectory": 8, "tempting": 8}}, r"tempting must be at most 7, got 8"),
        ({"subject": {"trajectory": 2}}, r"limit must be at most 2, got 3"),
        ({"subject": {"trajectory": 8, "temptin": 2}}, r"subject has no field 'temptin': .*did you mean 'tempting'"),
        ({"models": {"a": {"method": "sft"}}}, r"models.a.data.pool: got 'safety', which draws text, expected a"),
        ({"subject": {"world": "tiny"}}, r"condition that pool 'labelled' of models.classifier draws 'trajectory'"),
    ],
)  # fmt: skip
def test_what_it_cannot_have_is_one_sentence(tmp_path, own, message):
    content = RECIPE | {"analyses": {}, "edits": {}, "attacks": {}} | own
    with pytest.raises(ValueError, match=message):
        yaml_file.read(written(tmp_path, content))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return written(tmp_path_factory.mktemp("trajectories"), RECIPE)


def ran(*words):
    from jaxsafety.cli import main as command

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(command, "_configure_jax", lambda *_, **__: None)
        assert command.main([str(word) for word in words]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    """The run directory after all stages, and the table that is printed at the end."""
    directory = tmp_path_factory.mktemp("trajectories") / "run"
    return directory, json.loads(ran("run", recipe, "--out", directory, "--format", "json"))


@pytest.mark.slow
def test_a_classifier_learns_and_a_policy_begun_high_averts_the_pattern(made):
    table = results.read_results([made[0] / "results" / "evaluate.parquet"])
    assert set(table["condition"]) == {"trajectory"}
    high = table.filter(lr_name="multiplier=10.0")
    for metric, least in (("refused", 0.9), ("optimality", 0.9), ("classified", 0.99)):
        values = high.filter(metric=metric)["value"]
        assert len(values) and (values >= least).all(), metric
    rows = metrics_file.read_metrics(made[0])
    (learned,) = {row["accuracy"] > 0.95 for row in rows if (row["method"], row["step"]) == ("classifier", 200)}
    # Where the pattern is averted, the multiplier falls.
    first, last = ([row["multiplier"] for row in rows if row["method"] == "lagrangian" and row["step"] == step
                    and row["lr_name"] == "multiplier=10.0"] for step in (200, 400))  # fmt: skip
    assert learned and len(last) == 2 and all(after < before for before, after in zip(first, last, strict=True))


@pytest.mark.slow
def test_its_report_says_what_is_judged(made):
    page = (made[0] / "report.html").read_text()
    assert "trajectory refused" in page and "an exact match earns 1.75 without it" in page


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits_and_multipliers(made, recipe, tmp_path, undrawn):
    words = ("run", recipe, "--out", tmp_path / "run")
    die_before_saving(lambda: ran(*words), LANES[-1], 400)
    ran(*words)
    assert_same_run(tmp_path / "run", made[0], LANES)
    curves = [
        [(row["method"], row["lr_name"], row["seed"], row["step"], row.get("multiplier")) for row in rows]
        for rows in map(metrics_file.read_metrics, (made[0], tmp_path / "run"))
    ]
    assert sorted(curves[0], key=str) == sorted(curves[1], key=str)
