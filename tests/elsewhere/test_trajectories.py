"""A study about no language model: a policy in a maze goes through every stage, and averts what is undesirable."""

import contextlib
import io
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from jaxsafety.config import yaml12
from jaxsafety.models.through import through
from jaxsafety.recipe import graph, yaml_file
from jaxsafety.rundir import metrics_file, results
from jaxsafety.study import pipeline
from jaxsafety.training import objective
from tests.disturbed import assert_same_run, die_before_saving
from tests.elsewhere import trajectories

HERE = "tests.elsewhere.trajectories"
LANES = ("base", "careful.penalty=0.0", "careful.penalty=10.0")
TRAINED = {
    "method": f"{HERE}:METHOD", "data": {"pool": f"{HERE}:POOL"}, "steps": 120, "chunk_steps": 60, "batch_size": 16,
    "lr": 0.02,
}  # fmt: skip
CAREFUL = {"from": "base", "steps": 240, "chunk_steps": 120, "penalty": [0.0, 10.0], "snapshots": 1}
RECIPE = {
    "subject": {"kind": f"{HERE}:SUBJECT", "side": 4, "horizon": 8},
    "seeds": [3, 5],
    "models": {"base": TRAINED, "careful": TRAINED | CAREFUL},
    "evaluate": {"prompts": 16, "batch_size": 8, "probe_prompts": 8},
    "analyze": {"prompts": 8, "attack_prompts": 8, "edit_prompts": 8},
    "analyses": {"output_space": {"directions": 4}},
    "claims": [f"{HERE}:CLAIMS"],
}


def _written(directory, content):
    path = directory / "maze.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _command(*words):
    """Runs the command line in this process and returns what it prints."""
    from jaxsafety.cli import main as command

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(command, "_configure_jax", lambda *_, **__: None)
        assert command.main([str(word) for word in words]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return _written(tmp_path_factory.mktemp("trajectories"), RECIPE)


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    """The run directory after all stages, and the table that is printed at the end."""
    directory = tmp_path_factory.mktemp("trajectories") / "run"
    return directory, json.loads(_command("run", recipe, "--out", directory, "--format", "json"))


@pytest.fixture(scope="module")
def run(made):
    return made[0]


@pytest.fixture(scope="module")
def policies(run):
    """The most likely moves ``[n]`` of every lane and seed."""
    study = pipeline.prepare(yaml_file.recorded(run), run)
    found = jax.device_get(pipeline.load(study, study.recipe.lanes).params)
    logits = jax.vmap(jax.vmap(lambda params: trajectories.logits(params, jnp.arange(16))))(found)
    return dict(zip(LANES, np.asarray(logits.argmax(-1)), strict=True))


def _walked(moves, cell, *, horizon=8):
    """Cells after every step of a policy, by the words of the maze: rows of four cells, the goal at the end of the
    first."""
    row, column, path = *divmod(cell, 4), [cell]
    for _ in range(horizon):
        down, right = trajectories.MOVES[moves[path[-1]]]
        if (row, column) != (0, 3):
            row, column = min(max(row + down, 0), 3), min(max(column + right, 0), 3)
        path.append(4 * row + column)
    return path


def _crosses(path):
    return any({one % 4, other % 4} <= {1, 2} for one, other in itertools.pairwise(path))


def test_the_optimum_is_that_of_the_shortest_way_without_the_pattern():
    best = trajectories.maze(trajectories.Config(side=4, horizon=8)).best.reshape(4, 4)
    # A step that ends in the goal earns one, and so does every one there.
    np.testing.assert_array_equal(best[:, 3], [8, 8, 7, 6])
    np.testing.assert_array_equal(best[:, 2], [8, 7, 6, 5])
    np.testing.assert_array_equal(best[:, :2], 0)


@pytest.mark.slow
def test_a_penalty_has_the_policy_avert_the_pattern_and_keep_its_return(policies):
    for seed in range(2):
        for lane, moves in policies.items():
            # This side of the carpet every one takes a shortest way.
            for cell, steps in ((7, 1), (11, 2), (15, 3)):
                path = _walked(moves[seed], cell)
                assert path.index(3) == steps and not _crosses(path), lane
            for cell in (0, 4, 8, 12):
                path = _walked(moves[seed], cell)
                assert (_crosses(path), 3 in path) == ((False, False) if "10" in lane else (True, True)), lane


@pytest.fixture(scope="module")
def table(run):
    return results.read_results([run / "results" / "evaluate.parquet"])


@pytest.mark.slow
def test_it_is_judged_on_its_own_conditions_by_its_own_rates(table, policies):
    assert set(table["condition"]) == {"plain", "hazard"}
    assert set(table["metric"]) == {"complied", "refused", "exact_match"}
    assert set(table["method"]) == {"base", "careful"} and table.height == 3 * 2 * 2 * 3
    rates = {(row["condition"], row["metric"]): set() for row in table.iter_rows(named=True)}
    for row in table.filter(lr_name="penalty=10.0").iter_rows(named=True):
        rates[row["condition"], row["metric"]].add(row["value"])
    assert rates["plain", "complied"] == rates["plain", "exact_match"] == {1.0} and rates["plain", "refused"] == {0.0}
    # Nothing is to be had beyond the carpet.
    assert rates["hazard", "refused"] == rates["hazard", "exact_match"] == {1.0}
    before = table.filter(method="base", condition="hazard")
    assert set(before["value"]) == {0.0}


@pytest.mark.slow
def test_its_curves_have_the_terms_of_its_loss_and_its_rates(run):
    rows = metrics_file.read_metrics(run)
    last = [row for row in rows if row["method"] == "careful" and row["step"] == 240]
    assert len(last) == 2 * 2 and {row["step"] for row in rows if row["method"] == "base"} == {60, 120}
    for row in last:
        assert row["loss"] == pytest.approx(row["loss/return"] + row["loss/curiosity"], rel=1e-4)
        assert {"return", "crossed", "plain/exact_match", "hazard/refused", "hazard/complied"} <= row.keys()
    crossed = {row["lr_name"]: row["crossed"] for row in last}
    assert crossed["penalty=10.0"] < crossed["penalty=0.0"]


def test_values_of_a_traced_field_are_one_program(recipe):
    assert [len(group) for group in graph.groups(yaml_file.read(recipe).lanes)] == [1, 2]


@pytest.mark.slow
def test_a_batch_may_be_taken_in_parts(key):
    config = trajectories.MethodConfig(penalty=3.0)
    subject = trajectories.opened(trajectories.Config())
    params, cells = subject.init(key), jnp.asarray([0, 4, 7, 11])
    batch = trajectories.METHOD.data(trajectories.Starts(cells), key=key, config=config)
    state = objective.init_state(trajectories.METHOD, params, optax.sgd(0.1), config, key=key)
    whole, parts = (
        objective.make_gradient(
            trajectories.METHOD, subject.training, config, key=key, total_steps=1, parts=count
        )(state, batch)
        for count in (1, 2)
    )  # fmt: skip
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_part_of_its_parameters_may_be_what_is_trained(key):
    subject, cells = trajectories.opened(trajectories.Config()), jnp.arange(4)
    params = subject.init(key)
    model = through(subject.training, lambda gate: params | {"embed": gate * params["embed"]})
    seen, expected = model(jnp.float32(2), cells), subject.training(params | {"embed": 2 * params["embed"]}, cells)
    np.testing.assert_array_equal(seen.said, expected.said)


@pytest.mark.slow
def test_its_weights_are_analysed_and_reported(run, made, main, tmp_path):
    rows = results.read_results([run / "results" / "analyze.parquet"], schema=results.ANALYSIS_SCHEMA)
    excess = rows.filter(analysis="output_space", metric="excess")
    assert set(excess["part"]) == {"up", "down"} and set(excess["method"]) == {"careful"}
    assert excess["value"].is_not_null().all() and excess["step"].n_unique() == 2
    page = (run / "report.html").read_text()
    assert all(word in page for word in ("plain exact_match", "hazard refused", "penalty=10.0", "The update and the"))
    # What is said of verdicts elsewhere is not said here.
    assert not re.search(r"Instruct|unsafe operator|JB-CO", page)
    assert main("figure", "output_space", run, "--out", tmp_path / "own.svg") == 0
    found = {row["lr_name"]: row for row in made[1]}
    assert (found["penalty=10.0"]["plain exact_match"], found["penalty=10.0"]["hazard refused"]) == (1, 1)
    assert found["penalty=0.0"]["hazard refused"] == 0


@pytest.mark.slow
def test_its_claims_are_judged_by_its_results(run, main, capsys):
    assert main("claims", run, "--format", "json") == 0
    (claim,) = json.loads(capsys.readouterr().out)
    assert claim["values"] == {"3": 1.0, "5": 1.0} and claim["mean"] == 1


@pytest.mark.slow
def test_the_commands_tell_of_it(run, recipe, main, capsys):
    assert main("status", run) == 0
    assert "careful" in capsys.readouterr().out
    assert main("run", recipe, "--out", run.parent / "other", "--dry_run") == 0
    told = capsys.readouterr().out
    assert "careful: tests.elsewhere.trajectories:METHOD from base; 2 lanes x 2 seeds, program 2" in told
    assert "programs to compile for training: 2" in told
    assert main("run", recipe, "--print_config") == 0
    printed = yaml12.load(capsys.readouterr().out)
    assert printed["subject"] == RECIPE["subject"] | {"width": 16} and printed["edits"] == printed["attacks"] == {}
    assert printed["evaluate"]["conditions"] == ["plain", "hazard"]
    again = yaml_file.parse(printed, where="again")
    assert yaml_file.as_dict(again) == yaml_file.as_dict(yaml_file.read(recipe, overrides=["--name", again.name]))


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(run, recipe, tmp_path, undrawn):
    copy = tmp_path / "run"
    words = ("run", recipe, "--out", copy)
    # The one before it in the same program is finished by then.
    die_before_saving(lambda: _command(*words), "careful.penalty=10.0", 240)
    _command(*words)
    assert_same_run(copy, run, LANES)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"attacks": {"prefill": {}}}, r"attacks.prefill: models of .*:SUBJECT read no text: expected no attacks"),
        ({"edits": {"whole": {"edit": "scaled"}}}, r"edits.whole: models of .* read no text: expected no edits"),
        ({"analyses": {"clusters": {}}}, r"analyses.clusters: models of .* read no text: expected analyses of weights"),
        ({"subject": RECIPE["subject"] | {"sides": 4}}, r"subject has no field 'sides': .*did you mean 'side'"),
        ({"subject": RECIPE["subject"] | {"side": 3}}, r"subject: side must be >= 4 and <= 64 and finite, got 3"),
        (
            {"evaluate": RECIPE["evaluate"] | {"conditions": ["hazzard"]}},
            r"condition.* 'hazzard': expected .*; did you mean 'hazard'",
        ),
        (
            {"evaluate": RECIPE["evaluate"] | {"conditions": ["safe"]}},
            r"condition.* 'safe': expected one of plain, hazard",
        ),
        ({"models": {"base": TRAINED | {"penalti": 1.0}}}, r"models.base has no field 'penalti': .*mean 'penalty'"),
        ({"models": {"base": TRAINED | {"data": {}}}}, r"learns from trajectories: expected a data.pool that has them"),
        ({"models": {"base": TRAINED | {"data": {"pool": "safety"}}}}, r"data.pool: got 'safety', which has prefer"),
    ],
)
def test_what_it_cannot_have_is_one_sentence(tmp_path, own, message):
    content = {key: value for key, value in RECIPE.items() if key != "models"} | {"models": {"base": TRAINED}}
    with pytest.raises(ValueError, match=message):
        yaml_file.read(_written(tmp_path, content | own))
