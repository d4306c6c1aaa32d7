"""What an attack puts in the place of what was there is judged: parameters, a hook, a decoding rule, prompts."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, tree
from jaxsafety.recipe.nodes import AttackConfig
from jaxsafety.study import judged, lanes
from jaxsafety.study.view import Prompts
from jaxsafety.subjects import judge
from jaxsafety.types import Attack, Attacked, Decode
from jaxsafety.world import batch_at

RATES = ("complied", "refused", "other")


@dataclass(frozen=True)
class Config:
    """It has no options."""


def _made(attacked):
    return Attack(Config, lambda target, config, *, point, key: attacked(target))


PARAMS = _made(lambda target: Attacked(params=target.base))
DECODE = _made(lambda target: Attacked(decode=Decode(((target.base, target.model),), lambda logits: logits[1])))
NOTHING = _made(lambda target: Attacked())
TOWARDS = _made(lambda target: Attacked(edit=partial(_pushed, 1.0)))
AWAY = _made(lambda target: Attacked(edit=partial(_pushed, -1.0)))
CLASH = _made(lambda target: Attacked(metrics={"refused": jnp.ones(4)}))
UNJUDGED = _made(lambda target: Attacked(trial=_without_answers(target.trial)))


def _alternating(width):
    """A direction that a layer norm leaves alone."""
    return jnp.where(jnp.arange(width) % 2 == 0, 1.0, -1.0)


def _pushed(sign, site, layer, positions, h):
    return jnp.broadcast_to(sign * _alternating(h.shape[-1]), h.shape) if site == "hook_resid_post" else h


def _without_answers(trial):
    """The prompts with every other one left out."""
    kept = (jnp.arange(len(trial.last)) % 2 == 0)[:, None]
    return trial.replace(refused=trial.refused.replace(mask=trial.refused.mask & kept))


@pytest.fixture(scope="module")
def models(mini_subject, tiny_world):
    """A model that says refusals, since its rows of the unembedding are large, and one that does not."""
    params = jax.jit(lambda key: lanes.init_params(mini_subject, key=key))(keys.root(0))
    refusal = tiny_world.ids[tiny_world.spec.letters[0]]
    says = jnp.zeros_like(params["unembed"]).at[:, refusal].set(1.0)
    constant = jax.tree.map(jnp.zeros_like, params)
    constant["norm"]["bias"] = jnp.ones_like(params["norm"]["bias"])
    return constant | {"unembed": says}, params


@pytest.fixture(scope="module")
def prompts(tiny_world):

    @jax.jit
    def draw(key):
        drawn = [batch_at(tiny_world, name, key=key, step=0, batch_size=4) for name in ("safe", "unsafe")]
        return tree.stack(drawn)

    trials = draw(keys.root(1))
    # A model that always says the refusal's letter never stops.
    letters = trials.refused.targets != tiny_world.special["stop"]
    trials = trials.replace(refused=trials.refused.replace(mask=trials.refused.mask & letters))
    return Prompts(trials=trials, held_out=trials)


@pytest.fixture(scope="module")
def attacked(mini_recipe, mini_subject, models, prompts):
    """``(name of an attack) -> measures`` of the second condition's prompts, on the model that refuses."""
    refusing, base = models

    def run(name):
        node = AttackConfig(f"tests.study.test_judged:{name}")
        measure = partial(judged.attacked_measures, mini_recipe, mini_subject, node, places=(1,), point={})
        found = jax.jit(measure)((refusing, base), (keys.root(0), prompts))
        return {metric: np.asarray(values)[0] for (metric, _), values in found.items()}

    return run


@pytest.fixture(scope="module")
def plain(mini_subject, models, prompts):
    """The rates of both models on those prompts, by the judge alone."""
    trial = tree.lane(prompts.trials, 1)
    run = jax.jit(lambda params: judge.judge(mini_subject.analysed, params, trial))
    return [{name: float(rates[name].mean()) for name in RATES} for rates in map(run, models)]


@pytest.mark.parametrize(("name", "place"), [("NOTHING", 0), ("PARAMS", 1), ("DECODE", 1)])
def test_what_an_attack_leaves_is_as_it_was_and_what_it_gives_is_judged(attacked, plain, name, place):
    found = attacked(name)
    assert {rate: found[rate] for rate in RATES} == pytest.approx(plain[place])
    assert found["n_prompts"] == 4


def test_the_models_that_are_compared_answer_differently(plain):
    assert plain[0]["refused"] == 1 and plain[1]["refused"] == 0


@pytest.mark.parametrize(("name", "refused"), [("TOWARDS", 1.0), ("AWAY", 0.0)])
def test_a_hook_changes_what_the_model_answers(mini_recipe, mini_subject, tiny_world, models, prompts, name, refused):
    """The model says the refusal's letter where its last residual stream points along one direction."""
    _, base = models
    refusal = tiny_world.ids[tiny_world.spec.letters[0]]
    says = jnp.zeros_like(base["unembed"]).at[:, refusal].set(_alternating(base["embed"].shape[1]))
    node = AttackConfig(f"tests.study.test_judged:{name}")
    measure = partial(judged.attacked_measures, mini_recipe, mini_subject, node, places=(1,), point={})
    found = jax.jit(measure)((base | {"unembed": says}, base), (keys.root(0), prompts))
    assert found[("refused", "attacked")][0] == refused


def test_a_metric_of_the_judges_name_is_refused(attacked):
    with pytest.raises(ValueError, match="an attack has a metric 'refused', which every attack has"):
        attacked("CLASH")


def test_a_prompt_of_which_nothing_is_judged_is_left_out(attacked):
    found = attacked("UNJUDGED")
    assert found["n_prompts"] == 2 and sum(found[name] for name in RATES) == pytest.approx(1)
