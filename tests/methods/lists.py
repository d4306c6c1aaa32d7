"""Pairs of answers as lists of tokens, and a model of all that stands before whose log-probabilities need no jax."""

import jax.numpy as jnp
import numpy as np

from jaxsafety import keys, methods
from jaxsafety.config import fields
from jaxsafety.models.adapter import adapted
from jaxsafety.training import objective
from jaxsafety.types import Batch, PreferenceBatch

VOCAB, STATES, LENGTH, END = 9, 31, 14, 8
PROMPTS = [[1, 2], [3], [2, 4, 1], [5, 2, 7], [6, 6]]
REFUSALS = [[3, 4, 5, END], [3, 6, END], [4, 2, 2, 2, END], [3, END], [3, 1, END]]
REPLIES = [[1, 1, 2, 6, 1, END], [2, 5, 7, END], [6, 1, 5, 5, END], [7, 6, 5, 4, 3, 2, 1, END], [5]]
# Of one form: as long as each other.
FILLED = [[3, 3, 3, 3, 3, END], [3, 4, 3, END], [3, 3, 3, 3, END], [3, 4, 5, 3, 4, 5, 3, END], [5]]
SAFE = [[4, 4, END], [2, END], [1, 2, 3, END], [7, END], [5, 5, END]]
TABLE = np.random.default_rng(0).normal(size=(STATES, VOCAB))
PARAMS = {"table": jnp.asarray(TABLE, jnp.float32)}
# Another model, to be compared with.
OTHER = TABLE + np.random.default_rng(1).normal(size=TABLE.shape)
REFERENCE = {"table": jnp.asarray(OTHER, jnp.float32)}


def logits(params, tokens):
    """Of the last token, its place and all tokens before."""
    weights = jnp.arange(1, tokens.shape[1] + 1)[None, :]
    return params["table"][jnp.cumsum(tokens * weights, axis=1) % STATES]


MODEL = adapted(logits, max_tokens=64)


def nll(before, target, table=TABLE):
    """Of a token behind a list of tokens, float64."""
    row = table[sum(place * token for place, token in enumerate(before, 1)) % STATES]
    return np.log(np.exp(row).sum()) - row[target]


def of_answer(before, answer):
    """Of every token of an answer."""
    return [nll(before + answer[:i], token) for i, token in enumerate(answer)]


def logprob(before, answer, table=TABLE):
    """Of a whole answer."""
    return -sum(nll(before + answer[:i], token, table) for i, token in enumerate(answer))


def unscored(batch):
    """The same batch with targets beyond the vocabulary where nothing is scored."""
    sides = [side.replace(targets=jnp.where(side.mask, side.targets, 99)) for side in (batch.chosen, batch.rejected)]
    return batch.replace(chosen=sides[0], rejected=sides[1])


def padded(sequences, length=LENGTH):
    """A batch of (prompt, answer), the answers scored; what is too long is cut off."""
    whole, mask = np.zeros((len(sequences), length + 1), np.int32), np.zeros((len(sequences), length), bool)
    for row, (prompt, answer) in enumerate(sequences):
        tokens = (prompt + answer)[: length + 1]
        whole[row, : len(tokens)] = tokens
        mask[row, len(prompt) - 1 : len(tokens) - 1] = True
    return Batch(jnp.asarray(whole[:, :-1]), jnp.asarray(whole[:, 1:]), jnp.asarray(mask))


def pairs(*, unsafe, aligned=False, length=LENGTH):
    """Unsafe prompts are to be refused, safe ones to be answered."""
    refusals, count = FILLED if aligned else REFUSALS, len(PROMPTS)
    sides = [refusals[i] if unsafe[i] else SAFE[i] for i in range(count)], REPLIES
    chosen, rejected = (padded(list(zip(PROMPTS, side, strict=True)), length) for side in sides)
    return PreferenceBatch(chosen, rejected, jnp.asarray(unsafe), aligned=aligned)


def turned(row, depth, *, aligned=False):
    """What follows the first tokens of a harmful answer: a refusal from its beginning, or from there on."""
    return FILLED[row][depth:] if aligned else REFUSALS[row]


def transformed(method, batch, *, seed=0, **options):
    return objective.transformed(method, batch, method.Config(**options), key=keys.root(seed))


def traced(name, batch, *, reference=None, **scalars):
    """A method's loss with fields of a lane's own."""
    method = methods.load(name)
    config = fields.at_point(method.Config(), scalars)
    return objective.make_loss(method, MODEL, config, reference=reference, key=keys.root(0))(PARAMS, batch)[0]


def repeated(batch, times):
    """The same examples many times over, for what is drawn."""
    sides = [
        side.replace(**{name: jnp.tile(getattr(side, name), (times, 1)) for name in ("tokens", "targets", "mask")})
        for side in (batch.chosen, batch.rejected)
    ]
    return batch.replace(chosen=sides[0], rejected=sides[1], unsafe=jnp.tile(batch.unsafe, times))


def depths(before, after):
    """How many tokens later the first scored target stands, by row."""
    return np.asarray(after.chosen.mask).argmax(1) - np.asarray(before.chosen.mask).argmax(1)
