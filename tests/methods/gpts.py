"""A small GPT, with weights of order one, of the tokens in :mod:`tests.methods.lists`: a model with layers inside."""

from functools import partial

import jax
import numpy as np

from jaxsafety.models import gpt
from tests.methods.lists import LENGTH, VOCAB, pairs

CONFIG = gpt.GPTConfig(vocab_size=VOCAB, max_tokens=LENGTH + 6, layers=2, heads=2, width=8, mlp_width=8)
MODEL = gpt.model(CONFIG)
SITE = "hook_resid_post"
UNSAFE = np.array([True, False, True, True, False])
BATCH = pairs(unsafe=UNSAFE)


def drawn(seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(gpt.init, CONFIG), key=jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.numpy.float32(0.4 * rng.normal(size=leaf.shape)), shapes)


PARAMS, OTHER = drawn(0), drawn(1)


@jax.jit
def states(params, tokens):
    """What leaves every layer, ``[l, b, t, d]``."""
    return MODEL.apply(params, tokens, sites=(SITE,)).activations[SITE]


def answer_places(mask):
    """Of every answer the places where its own tokens stand, by row."""
    return [[place + 1 for place in np.flatnonzero(row) if place + 1 < len(row)] for row in np.asarray(mask)]


def misread(side):
    """The side with targets beyond the vocabulary where nothing is scored."""
    return side.replace(targets=jax.numpy.where(side.mask, side.targets, 99))
