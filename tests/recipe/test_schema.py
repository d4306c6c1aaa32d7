"""A recipe refuses what cannot run, field by field, before any device work."""

import math
from dataclasses import fields, replace
from typing import get_type_hints

import pytest
import yaml

from jaxsafety import analysis, world
from jaxsafety.methods import dpo, unlearn
from jaxsafety.models import gpt
from jaxsafety.pools import explicit, safety
from jaxsafety.recipe.models import Data, Training
from jaxsafety.recipe.schema import AnalyzeConfig, EvaluateConfig, Recipe, as_dict
from jaxsafety.subjects import checkpoint
from jaxsafety.subjects.synthetic import ModelConfig

pytestmark = pytest.mark.usefixtures("unchecked")


def test_the_defaults_are_a_valid_study():
    recipe = Recipe()
    assert {lane.training.method for lane in recipe.tuned} == {"sft", "dpo", "unlearn"}
    assert [lane.name for lane in recipe.lanes][:3] == ["pretrained", "sft.eta_M", "sft.eta_S"]
    assert recipe.evaluate.conditions == tuple(world.CONDITIONS)
    assert recipe.evaluate.prompts >= 1000 and len(recipe.seeds) >= 4


@pytest.mark.parametrize("name", ["steps", "batch_size", "chunk_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be > 0 and finite, got {value}$"):
        Training(**{name: value})


@pytest.mark.parametrize("name", ["prompts", "batch_size", "probe_prompts"])
def test_evaluation_sizes_are_positive(name):
    with pytest.raises(ValueError, match=rf"evaluate\.{name} must be > 0"):
        EvaluateConfig(**{name: 0})


@pytest.mark.parametrize("rate", [0.0, -1e-3, math.nan, math.inf])
def test_learning_rates_are_positive_numbers(rate):
    with pytest.raises(ValueError, match=r"^lr must be > 0 and finite, got"):
        Training(lr=rate)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: EvaluateConfig(prompts=100, batch_size=64),
            "must be a multiple of evaluate.batch_size, got 100 and 64",
        ),
        (lambda: EvaluateConfig(conditions=("safe", "safe")), "must name distinct conditions"),
        (lambda: Recipe(strategy="vmpa"), "unknown strategy 'vmpa': expected one of auto, .*did you mean 'vmap'"),
        (lambda: Recipe(seeds=3), "^seeds must be a list, got 3"),
        (lambda: ModelConfig(block="pre"), "unknown block 'pre': expected one of paper, pre_ln"),
        (lambda: Training(steps=2.5), "^steps must be an integer, got 2.5"),
        (
            lambda: Recipe(evaluate=EvaluateConfig(conditions=("jb_misgn",))),
            "unknown condition in evaluate.conditions 'jb_misgn'.*did you mean 'jb_misgen'",
        ),
        (
            lambda: Recipe(evaluate=EvaluateConfig(conditions=("safe", "unsafe", "persona"))),
            "unknown condition in evaluate.conditions 'persona': expected one of safe, unsafe, jb_co_task,",
        ),
        (
            lambda: Recipe(
                models={
                    "base": {"method": "pretrain"},
                    "told": {"from": "base", "method": "sft", "data": {"pool": "identity"}},
                }
            ),
            "unknown condition that pool 'identity' of models.told draws 'persona_safe': expected one of safe, unsafe",
        ),
        (lambda: Recipe(subject={}), "^subject must have the field world or checkpoint or trajectory, or `kind: p"),
        (lambda: Recipe(subject="tiny"), "^subject must hold fields such as `world: tiny`, got 'tiny'"),
        (lambda: Recipe(subject={"world": "tinny"}), "^subject: unknown world 'tinny': expected one of paper, tiny"),
        (
            lambda: ModelConfig(compute_dtype="bf16"),
            "unknown compute_dtype 'bf16': expected one of float32, bfloat16; did you mean 'bfloat16'",
        ),
        (
            lambda: checkpoint.Config("somewhere", stored_dtype="bfloat16"),
            "stored_dtype: got 'bfloat16', expected dtype bfloat16 as well",
        ),
        (lambda: Training("ppo"), "unknown method 'ppo': expected one of pretrain, sft, dpo, unlearn"),
        (
            lambda: Data("txt"),
            "unknown pool 'txt': expected one of text, safety, .*, labelled; did you mean 'text'",
        ),
        (lambda: Data(prompts=0), "prompts must be >= 1 and <= 32768 and finite, got 0"),
        (lambda: Training("pretrain"), "data.pool: got 'safety', which has preferences, expected a pool of text"),
        (lambda: Training("sft", data=Data("text")), "data.pool: got 'text', which has text, expected a pool of pref"),
        (lambda: safety.Config(p_unsafe=1.1), "p_unsafe must be >= 0 and <= 1 and finite, got 1.1"),
        (lambda: explicit.Config(p_unsafe=math.nan), "p_unsafe must be >= 0 and <= 1 and finite, got nan"),
        (lambda: dpo.Config(weight_chosen=-1.0), "weight_chosen must be >= 0 and finite, got -1"),
        (lambda: dpo.Config(weight_rejected=math.inf), "weight_rejected must be >= 0 and finite, got inf"),
        (lambda: unlearn.Config(ascent_bound=0.0), "ascent_bound must be > 0, got 0.0"),
        (lambda: Recipe(seeds=()), "seeds must name at least one seed"),
        (lambda: Recipe(seeds=(1, 2, 1)), r"seeds must be distinct, got \[1, 2, 1\]"),
        (lambda: Recipe(seeds=(0, -1)), "seeds must be >= 0"),
        (lambda: Recipe(seeds=(2**32,)), r"seeds must be >= 0 and < 2\^32"),
        (lambda: Recipe(name="a/b"), "name must be a plain file name, got 'a/b'"),
        (lambda: Recipe(name=".."), r"name must be a plain file name, got '\.\.'"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_no_conditions_are_all_that_the_subject_has():
    assert Recipe(evaluate=EvaluateConfig(conditions=())) == Recipe()
    assert Recipe().read_out == ("safe", "unsafe")


def test_what_a_recipe_does_not_name_is_all_that_the_paper_has(mini_recipe):
    default = Recipe()
    assert (list(default.attacks), list(default.analyses)) == (["prefill", "soft_tokens"], list(analysis.DEFAULT))
    assert set(mini_recipe.analyses) == set(analysis.DEFAULT)
    assert {"whole", "rank", "layer", "transfer"} <= set(default.edits)
    empty = Recipe(edits={}, attacks={}, analyses={})
    assert (empty.edits, empty.attacks, empty.analyses) == ({}, {}, {})


SECTIONS = {"subject.model": ModelConfig, "evaluate": EvaluateConfig, "analyze": AnalyzeConfig}


def integers():
    """Section and name of every field that holds an integer, or several."""
    for section, of in SECTIONS.items():
        for name, kind in get_type_hints(of).items():
            if kind in (int, int | None, tuple[int, ...]):
                yield section, name, kind


@pytest.mark.parametrize(("section", "name", "kind"), list(integers()))
@pytest.mark.parametrize("number", [2**31, 2**63, 10**30])
def test_a_number_that_no_machine_can_hold_is_refused(section, name, kind, number):
    given = {name: (number,) if kind == tuple[int, ...] else number}
    with pytest.raises(ValueError, match=rf"^{section}.* must be .*{number}") as caught:
        if section == "subject.model":
            Recipe(subject={"world": "tiny", "model": given})
        else:
            Recipe(**{section: SECTIONS[section](**given)})
    assert "\n" not in str(caught.value)


def test_the_largest_numbers(tiny_world):
    def study(**fields):
        return Recipe(models={"a": {"method": "pretrain", "data": {"pool": "text"}} | fields})

    kept = study(steps=2**31 - 2, chunk_steps=3, batch_size=2**20)
    assert kept.lanes[0].training.steps == 2**31 - 2
    with pytest.raises(ValueError, match=rf"^models.a.steps must be at most {2**31 - 1}, got {2**31}$"):
        study(steps=2**31)
    with pytest.raises(ValueError, match=rf"^models.a.batch_size must be at most {2**20}, got {2**20 + 1}$"):
        study(batch_size=2**20 + 1)
    assert ModelConfig(layers=4, width=2**15).build(tiny_world).width == 2**15
    with pytest.raises(ValueError, match=r"^subject.model: layers times width squared must be at most"):
        ModelConfig(layers=4, width=2**16).build(tiny_world)


def test_unbounded_ascent_is_allowed():
    assert unlearn.Config(ascent_bound=math.inf).ascent_bound == math.inf


def test_a_model_takes_its_preset_and_what_differs(tiny_world):
    built = ModelConfig(preset="small", positions="rope", width=32).build(tiny_world)
    assert (built.layers, built.heads, built.width, built.positions) == (3, 4, 32, "rope")
    assert (built.vocab_size, built.max_tokens) == (tiny_world.vocab_size, tiny_world.max_tokens)
    assert ModelConfig(preset="paper").build(tiny_world) == gpt.preset(
        "paper", vocab_size=tiny_world.vocab_size, max_tokens=tiny_world.max_tokens
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 3}, "heads: got 3, expected a divisor of width 64"),
        ({"layers": 0}, "layers: got 0, expected an integer of at least 1"),
        ({"width": -8}, "width: got -8"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(tiny_world, sizes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**sizes).build(tiny_world)


def test_as_dict_is_plain_data(mini_recipe):
    plain = as_dict(mini_recipe)
    assert plain["seeds"] == [3, 5] and plain["models"]["dpo"]["weight_rejected"] == 0.1
    assert list(plain) == [field.name for field in fields(Recipe)]
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    changed = as_dict(replace(mini_recipe, seeds=(3,)))
    assert changed != plain
