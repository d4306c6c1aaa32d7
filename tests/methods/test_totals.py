"""Sums of the objectives: parts of a batch have the loss and the gradient of the whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsafety import keys, world
from jaxsafety.methods import objectives, totals
from jaxsafety.models import gpt
from jaxsafety.training import stepping
from jaxsafety.types import HParams, ReferencedBatch

# Two float32 programs that sum the same terms in another order.
RTOL = 2e-5
HPARAMS = HParams(peak_lr=1e-3, weight_chosen=0.5, weight_rejected=0.2, p_unsafe=0.5, ascent_bound=jnp.float32(np.inf))


@pytest.fixture(scope="module")
def batch(tiny_world):
    drawn = partial(world.tune_batch_at, tiny_world, step=0, batch_size=8, p_unsafe=0.5, mix="prompt")
    return jax.jit(lambda key: drawn(key=key))(keys.root(0))


@pytest.fixture(scope="module")
def forward(tiny_config):
    return jax.jit(lambda params, tokens: gpt.apply(params, tokens, config=tiny_config).logits)


@pytest.fixture(scope="module")
def cases(forward, batch, tiny_gpt, tiny_config):
    """By method: the sums, what they take, and the loss of whole batches."""
    reference = gpt.init(tiny_config, key=keys.root(7))
    chosen, rejected, _ = totals.both(forward, reference, batch)
    given = {"hparams": HPARAMS, "reduction": "sum"}
    return {
        "sft": (totals.next_token(forward), batch.chosen, objectives.next_token(forward), batch.chosen),
        "dpo": (
            totals.dpo(forward, **given),
            ReferencedBatch(batch, chosen, rejected),
            objectives.dpo(forward, reference=reference, **given),
            batch,
        ),
        "unlearn": (totals.unlearn(forward, **given), batch, objectives.unlearn(forward, **given), batch),
    }


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("method", ["sft", "dpo", "unlearn"])
def test_parts_have_loss_metrics_and_gradient_of_the_whole(cases, tiny_gpt, method, parts):
    summed, given, loss, whole = cases[method]
    value, metrics, grads = jax.jit(stepping.accumulated(summed, parts=parts))(tiny_gpt, given)
    (expected, wanted), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(tiny_gpt, whole)
    np.testing.assert_allclose(value, expected, rtol=RTOL)
    assert metrics.keys() == wanted.keys()
    for name, own in metrics.items():
        np.testing.assert_allclose(own, wanted[name], rtol=RTOL, atol=1e-6, err_msg=name)
    for own, other in zip(jax.tree.leaves(grads), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(own, other, rtol=RTOL, atol=RTOL * float(optax.tree.norm(gradient)))


def test_parts_with_few_scored_tokens_weigh_by_their_tokens(forward, tiny_gpt, batch):
    # One part keeps a single scored token: a mean of means would weigh it like all the others.
    mask = np.array(batch.chosen.mask)
    mask[:4] = False
    mask[0, np.flatnonzero(np.asarray(batch.chosen.mask)[0])[0]] = True
    uneven = batch.chosen.replace(mask=jnp.asarray(mask))
    value, _, _ = jax.jit(stepping.accumulated(totals.next_token(forward), parts=2))(tiny_gpt, uneven)
    expected, _ = objectives.next_token(forward)(tiny_gpt, uneven)
    np.testing.assert_allclose(value, expected, rtol=RTOL)


def test_gradients_of_bfloat16_parameters_are_summed_in_float32(tiny_config, tiny_gpt, batch):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_gpt)

    def forward(params, tokens):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return gpt.apply(wide, tokens, config=tiny_config).logits

    _, _, grads = jax.jit(stepping.accumulated(totals.next_token(forward), parts=2))(half, batch.chosen)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
