"""The analyze stage on the miniature study: which rows it writes, that they are what they say, and that it resumes."""

import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from jaxsafety import keys, tree, world
from jaxsafety.linalg import clusters, update_spaces
from jaxsafety.models import gpt
from jaxsafety.recipe.nodes import default_edits
from jaxsafety.rundir import results, signals
from jaxsafety.study import analyze, lanes, pipeline, probe, view
from jaxsafety.training import objective
from jaxsafety.world.layout import last_prompt_index

# float32 programs that XLA fuses in another order.
RTOL, ATOL = 2e-4, 2e-5
TUNED = [(method, rate) for method in ("sft", "dpo") for rate in ("eta_M", "eta_S")]


@pytest.fixture(scope="module")
def rows(finished_run):
    return results.read_results([finished_run / "results" / "analyze.parquet"], schema=results.ANALYSIS_SCHEMA)


@pytest.fixture(scope="module")
def ready(mini_recipe, finished_run):
    return pipeline.prepare(mini_recipe, finished_run)


@pytest.fixture(scope="module")
def subjects(ready):
    return probe.gather(ready)


def value(rows, **labels):
    (found,) = rows.filter(*(pl.col(name).eq_missing(label) for name, label in labels.items()))["value"]
    return found


def test_every_analysis_has_rows_of_every_model_seed_and_step(rows, mini_recipe):
    assert set(rows["analysis"]) == {*mini_recipe.analyses, *mini_recipe.attacks, "interventions"}
    assert set(rows["seed"]) == set(mini_recipe.seeds)
    (snapshot,) = mini_recipe.tuned[0].training.snapshot_steps
    models = {*rows.select("method", "lr_name", "step").iter_rows()}
    assert models == {("pretrained", "", 0)} | {(*model, step) for model in TUNED for step in (snapshot, 6)}
    along = rows.filter(step=snapshot)
    measured = {"clusters", "output_space", "input_space", "sensitivity", "verdicts", "interventions"}
    assert set(along["analysis"]) >= measured
    assert not rows.select("analysis", "metric", "method", "lr_name", "step", "seed", "condition", "subset", "layer",
                           "part", "strength").is_duplicated().any()  # fmt: skip


def test_a_pretrained_model_has_no_update_to_speak_of(rows):
    assert set(rows.filter(method="pretrained")["analysis"]).isdisjoint({"input_space", "output_space"})


def test_shares_sum_to_one(rows):
    for analysis in ("verdicts", "interventions", "soft_tokens", "prefill"):
        verdicts = rows.filter(analysis=analysis).filter(pl.col("metric").is_in(["complied", "refused", "other"]))
        labels = [name for name in rows.columns if name not in ("metric", "value")]
        np.testing.assert_allclose(verdicts.group_by(labels).agg(pl.col("value").sum())["value"], 1, rtol=RTOL)
    depths = rows.filter(analysis="refusal_depth").group_by("method", "lr_name", "seed", "step", "condition")
    np.testing.assert_allclose(depths.agg(pl.col("value").sum())["value"], 1, rtol=RTOL)
    histogram = rows.filter(metric="histogram").group_by("method", "lr_name", "seed", "step", "condition")
    np.testing.assert_allclose(histogram.agg(pl.col("value").sum())["value"], 1, rtol=RTOL)


@pytest.fixture(scope="module")
def one_seed(subjects):
    """One model, its base and its seed's prompts in NumPy: DPO eta_M, seed 5."""
    params, prompts = jax.device_get((subjects.models.params, subjects.prompts))
    return tree.lane(params, 3, 1), tree.lane(params, 0, 1), tree.lane(prompts, 1)


@pytest.fixture(scope="module")
def activations(mini_recipe, ready):
    """Plain forward passes, ``(params, tokens) -> {site: [l, b, t, f]}``."""
    config = mini_recipe.subject.options.model.build(ready.subject.source)
    apply = partial(gpt.apply, config=config, sites=("mlp.hook_in", "mlp.hook_post"))
    run = jax.jit(lambda params, tokens: apply(params, tokens).activations)
    return lambda params, tokens: jax.device_get(run(params, tokens))


@pytest.fixture(scope="module")
def by_hand(one_seed, activations):
    """The model's activations on its seed's prompts by plain forward passes, and its weights."""
    params, base, prompts = one_seed

    def last(trial):
        at = [last_prompt_index(int(length)) for length in trial.prompt.length]
        seen = activations(params, trial.complied.tokens)
        return {site: values[:, np.arange(len(at)), at] for site, values in seen.items()}

    seen = [last(tree.lane(prompts.trials, c)) for c in (0, 1)]
    held = [last(tree.lane(prompts.held_out, c))["mlp.hook_post"] for c in (0, 1)]
    return params, base, seen, held


def test_cluster_rows_are_the_library_on_plain_forward_passes(rows, by_hand, mini_recipe):
    _, _, seen, held = by_hand
    taus = jax.jit(lambda rows, held: clusters.relative_tau(rows, clusters.centroids(*held)))
    lane = {"method": "dpo", "lr_name": "eta_M", "seed": mini_recipe.seeds[1], "step": 6, "layer": 0, "part": "last"}
    for c, condition in enumerate(("safe", "unsafe")):
        expected = float(np.mean(taus(seen[c]["mlp.hook_post"], held)))
        got = value(rows, analysis="clusters", metric="relative_tau", condition=condition, subset="all", **lane)
        assert got == pytest.approx(expected, rel=RTOL, abs=ATOL)


def test_input_rows_are_the_library_on_plain_forward_passes(rows, by_hand, mini_recipe):
    params, base, seen, _ = by_hand
    before, after = (side["blocks"]["mlp"]["up"] for side in (base, params))
    space = jax.jit(update_spaces.input_space)(before, after - before, inputs=seen[1]["mlp.hook_in"])
    lane = {"method": "dpo", "lr_name": "eta_M", "seed": mini_recipe.seeds[1], "step": 6, "layer": 0, "part": "up"}
    got = value(rows, analysis="input_space", metric="gain", condition="unsafe", subset="all", **lane)
    assert got == pytest.approx(float(np.mean(space.gain)), rel=RTOL)


def test_the_response_is_the_mean_over_its_first_positions(one_seed, activations, mini_recipe, ready):
    params, _, prompts = one_seed
    look = partial(view.view, mini_recipe, ready.subject, sites=("mlp.hook_post",), key=keys.root(0))
    run = jax.jit(lambda given, prompts: look(given, given, prompts).seen["mlp.hook_post"])
    seen = jax.device_get(run(params, prompts))
    plain = activations(params, tree.lane(prompts.trials, 1).complied.tokens)["mlp.hook_post"]
    for b in range(4):
        trial, every = tree.lane(prompts.trials, 1, b), plain[:, b]
        length = int(trial.prompt.length)
        start = last_prompt_index(length)
        # Nine positions: eight letters at most, and the stop.
        expected = every[:, start : start + min(10, length + 1)].mean(1)
        np.testing.assert_allclose(seen.response[:, 1, b], expected, rtol=RTOL, atol=ATOL)
        np.testing.assert_allclose(seen.last[:, 1, b], every[:, start], rtol=RTOL, atol=ATOL)


def test_the_ends_of_every_intervention_are_the_models(rows):
    """No update is the pretrained model and the whole one the tuned, judged on the first prompts of the verdicts."""
    labels = {"condition": "unsafe", "subset": "all", "layer": None}
    for method, rate in TUNED:
        for seed in set(rows["seed"]):
            lane = {"method": method, "lr_name": rate, "seed": seed, "step": 6, **labels}
            whole = value(rows, analysis="interventions", metric="refused", part="whole", strength=1.0, **lane)
            assert whole == pytest.approx(value(rows, analysis="verdicts", metric="refused", part="", **lane))


def test_parts_of_the_update_add_up(one_seed):
    """Each of the edits that a study makes builds the tree that its label says, at strengths that are traced."""
    tuned, base, _ = one_seed
    keeps = ("only", "all_but")
    points = {f"{keep}_{space}": {} for keep in keeps for space in ("null", "range", "random")}
    points |= {"mlp_matrices": {"alpha": 1.0}, "rank": {"rank": 16}}
    points |= {"transfer": {"alpha": 1.0}, "whole": {"alpha": 0.0}}

    @jax.jit
    def build(trees, points):
        edits = default_edits()
        return {label: lanes.edited(edits[label], trees, point=p, key=keys.root(5)) for label, p in points.items()}

    edited = jax.device_get(build({"base": base, "target": tuned, "other": tuned}, points))
    built = {label: jax.tree.map(np.subtract, params, base) for label, params in edited.items()}
    whole = jax.tree.map(np.subtract, tuned, base)
    close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=RTOL, atol=ATOL))
    for space in ("null", "range", "random"):
        total = jax.tree.map(np.add, built[f"only_{space}"], built[f"all_but_{space}"])
        close(total, whole)
    both = jax.tree.map(np.add, built["only_null"], built["only_range"])
    close(both, built["mlp_matrices"])
    close(built["rank"], whole)
    close(built["transfer"], jax.tree.map(lambda leaf: 2 * leaf, whole))
    close(built["whole"], jax.tree.map(np.zeros_like, whole))


@pytest.mark.slow
def test_gradients_of_the_methods_are_compared_at_the_start(rows, mini_recipe, ready, subjects):
    """The pretrained model's row is the cosine of the losses' gradients on the analysis' batch."""
    s, seed = 1, mini_recipe.seeds[1]
    base = tree.lane(subjects.models.params, 0, s)
    # Two safe and two unsafe prompts.
    drawn = jax.device_get(subjects.prompts.trials)
    trials = jax.tree.map(lambda leaf: jnp.asarray(np.concatenate([leaf[s, 0, :2], leaf[s, 1, :2]])), drawn)
    batch = world.preferences(trials)
    assert trials.unsafe.tolist() == [False, False, True, True]
    flat = []
    for method in mini_recipe.compared.values():
        loss = objective.make_loss(method.load(), ready.subject.model, method.options, reference=base, key=keys.root(0))
        gradient = jax.jit(jax.grad(lambda p, loss=loss: loss(p, batch)[0]))(base)
        flat.append(np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(gradient)]))
    expected = flat[0] @ flat[1] / (np.linalg.norm(flat[0]) * np.linalg.norm(flat[1]))
    got = value(rows, analysis="gradients", metric="gradient_cosine", method="pretrained", seed=seed, part="sft~dpo")
    assert got == pytest.approx(expected, rel=1e-3)


def test_finished_pieces_are_kept_and_missing_ones_made_again(main, finished_run, mini_yaml, tmp_path, rows):
    run = shutil.copytree(finished_run, tmp_path / "mini")
    pieces = run / "results" / "analyze"
    before = {path.name: path.stat().st_mtime_ns for path in pieces.iterdir()}
    (run / "results" / "analyze.parquet").unlink()
    (pieces / "attack_prefill.parquet").unlink()
    assert main("analyze", mini_yaml, "--out", run) == 0
    after = {path.name: path.stat().st_mtime_ns for path in pieces.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {"attack_prefill.parquet"}
    again = results.read_results([run / "results" / "analyze.parquet"], schema=results.ANALYSIS_SCHEMA)
    assert again.drop("revision").equals(rows.drop("revision"))


@pytest.mark.slow
def test_a_dead_lane_is_null_and_touches_no_other(subjects, rows):
    """Two rows of the grid with one lane marked dead: its values are null, the rest is as it was."""
    models = subjects.models
    finite = models.finite.copy()
    finite[3, 1] = False
    frame = pl.concat(analyze._measured(subjects, models=models._replace(finite=finite), label="test"))
    dead = (pl.col("method") == "dpo") & (pl.col("lr_name") == "eta_M") & (pl.col("seed") == 5)
    assert frame.filter(dead)["value"].is_null().all() and frame.filter(dead).height
    living = frame.filter(~dead)
    assert not living["value"].is_null().any()
    labels = [name for name in rows.columns if name not in ("value", "revision")]
    both = living.join(rows, on=labels, nulls_equal=True, suffix="_before")
    assert both.height == living.height
    np.testing.assert_allclose(both["value"], both["value_before"], rtol=RTOL, atol=ATOL)


def test_an_edit_is_one_program_for_the_final_models_and_every_snapshot(ready, monkeypatch):
    made, edited = [], lanes.edited
    monkeypatch.setattr(lanes, "edited", lambda node, trees, **given: made.append(node) or edited(node, trees, **given))
    subjects = probe.gather(ready)
    for step, only in ((2, [1, 2]), (None, None)):
        frame = pl.concat(analyze._edit(subjects, subjects.models, "whole", step=step, only=only))
        assert set(frame["strength"]) == ({1.0} if only else {0.0, 1.0}) and set(frame["step"]) == {step or 6}
        assert set(frame["method"]) == ({"sft"} if only else {"sft", "dpo"})
    assert len(made) == 1


def test_a_run_that_was_not_tuned_says_what_comes_first(ready, tmp_path, finished_run):
    run = shutil.copytree(finished_run, tmp_path / "mini")
    shutil.rmtree(run / "checkpoints" / "dpo.eta_M")
    with pytest.raises(ValueError, match=r"no finished dpo.eta_M in .*: run `jaxsafety tune` on it first"):
        analyze.write(pipeline.prepare(ready.recipe, run))


def test_a_signal_ends_the_stage_after_the_piece_that_it_came_in(ready, tmp_path, finished_run, monkeypatch):
    run, made = shutil.copytree(finished_run, tmp_path / "mini"), []
    shutil.rmtree(run / "results")

    def piece(name, _):
        made.append(name)
        if name == "models":
            signal.raise_signal(signal.SIGTERM)
        yield pl.DataFrame(schema=results.ANALYSIS_SCHEMA)

    monkeypatch.setattr(probe, "gather", lambda _: None)
    monkeypatch.setattr(analyze, "pieces", lambda _: {name: partial(piece, name) for name in ("models", "prefill")})
    again = pipeline.prepare(ready.recipe, run)
    with pytest.raises(signals.Stopped, match="before the analysis prefill"), signals.deferred(lambda _: None):
        analyze.write(again)
    assert not pipeline.is_finished(again, "analyze")
    analyze.write(again)
    assert made == ["models", "prefill"] and pipeline.is_finished(again, "analyze")


def test_no_soft_tokens_are_the_unsafe_prompts_without_their_stop(rows):
    """Nothing is inserted, so refusals are those of the verdicts or more: the stop token is not judged."""
    bare = rows.filter(analysis="soft_tokens", part="count=0", metric="refused")
    assert set(bare["strength"]) == {0.0} and not bare.is_empty()
    labels = ["method", "lr_name", "seed", "step"]
    both = bare.join(rows.filter(analysis="verdicts", metric="refused", condition="unsafe"), on=labels)
    assert both.height == bare.height and (both["value"] >= both["value_right"] - ATOL).all()
