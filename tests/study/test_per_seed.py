"""A study whose seeds have worlds of their own: each seed is what it is by itself, and is judged in its own world."""

from dataclasses import replace

import jax
import numpy as np
import polars as pl
import pytest

from jaxsafety import keys, world
from jaxsafety.rundir import results
from jaxsafety.study import analyze, evaluate, lanes, pipeline, train

# A seed beside another and by itself: two float32 programs, and what six steps of training make of their roundings.
RTOL = 1e-3


@pytest.fixture(scope="module")
def recipe(mini_recipe):
    models = {name: mini_recipe.models[name] for name in ("pretrained", "sft")}
    return replace(
        mini_recipe, models=models, attacks={}, analyses={"verdicts": {}, "kept_energy": {}},
        subject={"world": "tiny", "worlds": "per_seed", "model": {"layers": 1, "heads": 2, "width": 16}},
        edits={"few": {"edit": "directions", "choice": "activations", "rank": [0, 2]}},
    )  # fmt: skip


@pytest.mark.slow
def test_every_seed_is_asked_in_its_own_world(recipe, tmp_path):
    study = pipeline.prepare(recipe, tmp_path)
    draw = {"stream": "evaluate", "late_probability": 0.1}
    drawn = jax.device_get(pipeline.draw_prompts(study, "unsafe", **draw))
    read_out = train._readout(study)[1]
    for place, seed in enumerate(recipe.seeds):
        own = world.load("tiny", drawn_by=seed)
        alone = study.subject._replace(trials=lambda *given, own=own, **named: world.batch_at(own, *given, **named))
        key = keys.root(seed)
        expected = lanes.prompts(alone, recipe.evaluate, condition="unsafe", key=keys.stream(key, "evaluate"),
                                 late_probability=0.1)  # fmt: skip
        shown = lanes.readout_prompts(alone, recipe.read_out, count=recipe.evaluate.probe_prompts, key=key)
        for found, one in ((drawn, expected), (read_out, shown)):
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, i=place: leaf[i], found), one)


@pytest.mark.slow
def test_a_seed_beside_another_is_the_seed_by_itself(recipe, tmp_path):
    rows = {}
    for name, seeds in (("both", recipe.seeds), ("one", recipe.seeds[1:])):
        study = pipeline.prepare(replace(recipe, seeds=seeds), tmp_path / name)
        for stage in ("pretrain", "tune"):
            train.train(study, stage)
        evaluate.write(study)
        analyze.write(study)
        folder = tmp_path / name / "results"
        frames = [results.read_results([folder / "evaluate.parquet"])]
        frames.append(results.read_results([folder / "analyze.parquet"], schema=results.ANALYSIS_SCHEMA))
        # What is the same in both is put in one order.
        columns = ["analysis", "method", "lr_name", "step", "condition", "part", "strength", "layer", "metric"]
        # An effect size divides by the spread of four prompts, which makes much of a rounding.
        kept = (pl.col("seed") == recipe.seeds[1]) & (pl.col("metric") != "effect_size")
        found = pl.concat(frames, how="diagonal").filter(kept)
        rows[name] = found.sort([column for column in columns if column in found.columns])
    assert rows["both"].height == rows["one"].height > 100
    assert rows["both"].select("metric", "condition", "part").equals(rows["one"].select("metric", "condition", "part"))
    both, one = (rows[name]["value"].to_numpy() for name in ("both", "one"))
    np.testing.assert_allclose(both, one, rtol=RTOL, atol=1e-5)
