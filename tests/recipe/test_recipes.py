"""Every recipe that ships: it parses, its world and model can be built, and its first steps run at a tiny size."""

from pathlib import Path

import numpy as np
import pytest

import jaxsafety
from jaxsafety import world
from jaxsafety.recipe import yaml_file
from jaxsafety.rundir import metrics_file
from jaxsafety.study import pipeline, train

RECIPES = sorted((Path(jaxsafety.__file__).parents[1] / "experiments").glob("*.yaml"))
# Those that reproduce the paper's table.
TABLES = {"quick", "paper_small", "paper", "official"}
# Those that judge the models of another run, which is not there, and train none; and those of one question.
OF_OTHERS = {"misgen", "update_spaces", "update_control"}
# Those on related papers, which begin with the models of related_base.
RELATED = {"covert", "derta", "landscape", "override", "qi2023", "safety_arithmetic", "somf"}
OF_ONE = {"misgen_when", "misgen_age", "emulated", "refusal_phrase", "related_base"}
# Every defence against every attack.
MATRICES = {"matrix", "matrix_quick"}
# Those about no text.
WORDLESS = {"safe_mdp"}
# What is cut: the sizes. World, grammar, positions, optimiser, mixture and methods stay the recipe's.
TINY = (
    "--seeds [0] --evaluate.probe_prompts 2 --models.*.steps 2 --models.*.chunk_steps 2 --models.*.batch_size 2 "
    "--models.*.snapshots 0"
).split()
SMALL = "--subject.model.layers 1 --subject.model.heads 2 --subject.model.width 16".split()


def names(path):
    return path.stem


def cut(path):
    return TINY if names(path) in WORDLESS else [*TINY, *SMALL]


def test_the_shipped_recipes_are_found():
    assert {names(path) for path in RECIPES} == TABLES | {
        "dpo_regimes", "thorough", *OF_OTHERS, *OF_ONE, *RELATED, *MATRICES, *WORDLESS
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_a_recipe_can_be_read_and_its_world_and_model_built(path):
    recipe = yaml_file.read(path)
    assert recipe.name == path.stem
    subject = recipe.subject.load().open(recipe.subject.options)
    if path.stem not in WORDLESS:
        config = subject.model.apply.keywords["config"]
        assert config.vocab_size == len(subject.source.spec.tokens)
    if path.stem in TABLES:
        # The paper's table: three methods, eta_M and a tenth of it.
        rates = {(lane.training.method, lane.point): lane.training.lr for lane in recipe.tuned}
        assert {method for method, _ in rates} == {"sft", "dpo", "unlearn"}
        for method in ("sft", "dpo", "unlearn"):
            assert rates[method, "eta_S"] == pytest.approx(rates[method, "eta_M"] / 10)
    # A thousand fresh prompts, of every condition but where others are the question.
    assert recipe.evaluate.prompts >= (256 if path.stem in RELATED | MATRICES else 512 if path.stem in OF_ONE else 1000)
    every = recipe.subject.load().conditions if path.stem in WORDLESS else world.CONDITIONS
    assert path.stem in OF_OTHERS | OF_ONE | RELATED | MATRICES or set(recipe.evaluate.conditions) == set(every)
    assert path.read_text().startswith("#"), "a recipe is headed by its command and what it is for"


TRAINED = [path for path in RECIPES if names(path) not in OF_OTHERS | RELATED]


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=names)
def test_the_first_steps_of_a_recipe_run(path, tmp_path):
    ready = pipeline.prepare(yaml_file.read(path, overrides=cut(path)), tmp_path)
    train.train(ready, "pretrain")
    first = ready.stage_lanes("pretrain")
    assert np.asarray(pipeline.load(ready, first).finite).all()
    rows = metrics_file.read_metrics(tmp_path)
    assert len(rows) == len(first)
    assert all(row["step"] == 2 and np.isfinite(row["loss"]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=names)
def test_the_first_tuning_steps_of_every_method_of_a_recipe_run(path, tmp_path):
    ready = pipeline.prepare(yaml_file.read(path, overrides=cut(path)), tmp_path)
    train.train(ready, "pretrain")
    train.train(ready, "tune")
    assert np.asarray(pipeline.load(ready, ready.recipe.tuned).finite).all()
