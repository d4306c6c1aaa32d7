"""Every attack on a Llama, as on a GPT: what it puts in its place is judged, and at no strength nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import attacks, world
from jaxsafety.config import fields
from jaxsafety.models import llama
from jaxsafety.subjects import judge
from jaxsafety.training.branching import whole
from jaxsafety.types import Target

# Of each, options that make it small, and the point at which it does nothing, if there is one.
SMALL = {"soft_tokens": {"count": (0, 1), "steps": (2,)}, "embedding_pgd": {"steps": 2, "match": 1.0},
         "gcg": {"steps": 1, "candidates": 2, "count": (0, 1)}}  # fmt: skip
NOTHING = {"prefill": {"depth": 0}, "soft_tokens": {"count": 0, "steps": 0}, "steering": {"alpha": 0.0},
           "refusal_direction": {"strength": 0.0}, "embedding_pgd": {"radius": 0.0}, "gcg": {"count": 0}}  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny_world):
    key = jax.random.key(3)
    config = llama.LlamaConfig(
        vocab_size=tiny_world.vocab_size, max_tokens=64, layers=2, heads=2, width=8, kv_heads=1, mlp_width=12,
        head_width=4,
    )  # fmt: skip
    params, base = (llama.init(config, key=jax.random.fold_in(key, place)) for place in (0, 1))
    unsafe, *pair = (
        world.batch_at(tiny_world, name, key=key, step=step, batch_size=3)
        for name, step in (("unsafe", 0), ("safe", 1), ("unsafe", 1))
    )
    held_out = jax.tree.map(lambda *sides: jnp.stack(sides), *pair)
    return Target(llama.model(config), params, base, unsafe, tiny_world.special["stop"], held_out)


def rates(target, name, point):
    attack = attacks.load(name)
    options = attack.Config(**SMALL.get(name, {}))
    given = {key: jnp.int32(one) if isinstance(one, int) else jnp.float32(one) for key, one in point.items()}
    done = attack.attack(target, options, point=given, key=jax.random.key(0))
    trial = target.trial if done.trial is None else whole(done.trial)
    weights = target.params if done.params is None else done.params
    given = {"edit": done.edit, "decode": done.decode}
    logits = judge.said(target.model, weights, trial.complied.tokens, **given).logits
    return judge.rates(target.model, weights, logits, trial, **given)


# Three kinds of what an attack may put in the place of what was there each time, all with the slow tests.
FEW = ("prefill", "steering", "emulated")
EACH = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in attacks.TABLE]


@pytest.mark.parametrize("name", EACH)
def test_an_attack_on_a_llama_is_judged(target, name):
    options = attacks.load(name).Config(**SMALL.get(name, {}))
    found = rates(target, name, fields.points(options)[-1])
    total = sum(found[rate] for rate in ("complied", "refused", "other"))
    np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize("name", NOTHING)
def test_at_no_strength_nothing_changes(target, name):
    plain = judge.judge(target.model, target.params, target.trial)
    found = rates(target, name, NOTHING[name])
    for rate in ("complied", "refused", "other", "token_accuracy_block1", "refusal_token_accuracy"):
        np.testing.assert_array_equal(found[rate], plain[rate])
