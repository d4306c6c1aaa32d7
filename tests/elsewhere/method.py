"""A method that the package does not know, as somebody would write it.

Unsafe prompts' hidden states are pulled towards a running mean, and safe prompts keep their likelihood: two terms over
different counts. The reference's hidden states measure how far the model has moved.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxsafety import losses
from jaxsafety.config.fields import check, static, traced
from jaxsafety.types import Method, Needs


@dataclass(frozen=True)
class Config:
    """Two terms.

    Attributes:
        pull: weight of the hidden states' term.
        layer: whose states.
        keep: share of an answer's scored targets that are kept.
    """

    pull: float = traced(0.1, at_least=0)
    layer: int = static(0, at_least=0)
    keep: float = traced(0.5, at_least=0, at_most=1)
    __post_init__ = check


def hidden(model, params, batch, config):
    seen = model.apply(params, batch.chosen.tokens, sites=("hook_resid_post",), layers=(config.layer,)).activations
    return jnp.mean(seen["hook_resid_post"][0], axis=1)


def data(batch, *, key, config):
    kept = jax.random.bernoulli(key, config.keep, batch.chosen.mask.shape) & batch.chosen.mask
    return batch.replace(chosen=batch.chosen.replace(mask=kept))


def init_aux(params, *, key, config):
    return {"safe": 0.01 * jax.random.normal(key, (params["embed"].shape[1],))}


def update_aux(aux, means, *, config):
    return {"safe": 0.9 * aux["safe"] + 0.1 * means["level"]}


def totals(model, params, batch, config, aux, *, key, progress):
    states = hidden(model, params, batch, config)
    logprobs = losses.token_logprobs(model.apply(params, batch.chosen.tokens).logits, batch.chosen.targets)
    distance = jnp.sum((states - aux["safe"][None]) ** 2, axis=-1) * (1 - progress)
    terms = {
        "kept": losses.nll(logprobs, batch.chosen.mask & ~batch.unsafe[:, None]),
        "pulled": losses.masked_sum(config.pull * distance, batch.unsafe),
    }
    moved = jnp.sum((states - batch.reference) ** 2, axis=-1)
    return terms, {"moved": losses.summed(moved), "level": losses.summed(jnp.mean(states, axis=-1))}


METHOD = Method(
    Config,
    totals,
    needs=lambda config: Needs(rejected=False),
    reference=hidden,
    data=data,
    init_aux=init_aux,
    update_aux=update_aux,
)
