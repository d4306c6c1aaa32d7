"""Public pure functions under jax's transformations: jitted as eager, vmapped as looped. One table."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsafety import keys, losses, tree, world
from jaxsafety.edits import dare, hdr, ties, trim
from jaxsafety.methods import dpo
from jaxsafety.models import generation, gpt, llama
from jaxsafety.subjects import judge
from jaxsafety.training import answers, optim, stepping
from jaxsafety.types import Batch, PreferenceBatch, Trial
from jaxsafety.world import conditions, layout, operators
from jaxsafety.world.layout import Prompt
from tests.methods.bound import bound

# float32 programs that XLA fuses and adds up in another order; integers and verdicts must be equal.
RTOL, ATOL = 2e-5, 2e-6
LANES = 3
B, T, V, W = 4, 6, 5, 7

CONFIG = gpt.GPTConfig(vocab_size=V, max_tokens=T, layers=1, heads=2, width=8)
MODEL = gpt.model(CONFIG)
LLAMA = llama.LlamaConfig(
    vocab_size=V, max_tokens=2 * T, layers=2, heads=4, kv_heads=2, width=8, mlp_width=6, head_width=4
)
REDUCE = {"reduction": "mean"}


def forward(params, tokens):
    return MODEL.apply(params, tokens).logits


def logits(key):
    return jax.random.normal(key, (B, T, V))


def tokens(key):
    return jax.random.randint(key, (B, T), 0, V)


def mask(key):
    return jax.random.bernoulli(key, 0.6, (B, T))


def logprobs(key):
    return -jax.random.exponential(key, (B, T))


def margins(key):
    return jax.random.normal(key, (B,))


def words(key):
    return jax.random.bits(key, (2,), jnp.uint32)


def params(key):
    return gpt.init(CONFIG, key=key)


def llama_params(key):
    return llama.init(LLAMA, key=key)


def batch(key):
    pieces = jax.random.split(key, 3)
    return Batch(tokens(pieces[0]), tokens(pieces[1]), mask(pieces[2]))


def scalar(key):
    return jax.random.uniform(key, (), minval=0.1, maxval=1.0)


def letters(key):
    length = jax.random.randint(key, (), 3, W + 1)
    return jnp.where(jnp.arange(W) < length, jax.random.randint(key, (W,), 0, 12), -1)


def prompt(key):
    pieces = jax.random.split(key, 3)
    text = jax.random.randint(pieces[0], (8,), 0, 12)
    length = jax.random.randint(pieces[1], (), 6, 9)
    tasks = jax.random.randint(pieces[2], (4,), 0, 9)
    return Prompt(pcfg=jnp.int32(1), tasks=tasks, letters=jnp.where(jnp.arange(8) < length, text, -1), length=length)


UNSAFE = jnp.ones(B, bool)
MIXED = jnp.arange(B) % 2 > 0


class Case(NamedTuple):
    """A function of arrays, and how to draw each of its arguments."""

    function: Any
    arguments: tuple[Any, ...]


def cases(built):
    table = jnp.asarray(built.bijections[0])
    optimizer = optax.sgd(0.1)
    totals = lambda p, b, aux, **_: answers.next_token(MODEL, p, b)  # noqa: E731
    step = stepping.make_step(stepping.make_gradient(totals, key=keys.root(0), total_steps=9), optimizer)
    pair = world.preferences
    return {
        "losses.token_logprobs": Case(losses.token_logprobs, (logits, tokens)),
        "losses.masked_sum": Case(losses.masked_sum, (logprobs, mask)),
        "losses.quotient": Case(losses.quotient, (scalar, scalar)),
        "losses.nll": Case(losses.nll, (logprobs, mask)),
        "losses.bounded": Case(lambda x, b: losses.bounded(x, bound=b), (logprobs, scalar)),
        "losses.sequence_logprobs": Case(partial(losses.sequence_logprobs, **REDUCE), (logprobs, mask)),
        "dpo.dpo": Case(
            lambda c, r, wc, wr: dpo.dpo(c, r, weight_chosen=wc, weight_rejected=wr),
            (margins, margins, scalar, scalar),
        ),
        "losses.correct": Case(losses.correct, (logits, tokens)),
        "losses.exact_match": Case(losses.exact_match, (mask, mask)),
        "losses.token_accuracy": Case(losses.token_accuracy, (mask, mask)),
        "tree.difference": Case(tree.difference, (params, params)),
        "tree.interpolate": Case(tree.interpolate, (params, params, scalar)),
        "trim.trimmed": Case(lambda d, k: trim.trimmed(d, keep=k), (params, scalar)),
        "hdr.harm_removed": Case(
            lambda p, d, k, s: hdr.harm_removed(p, d, keep=k, scale=s), (params, params, scalar, scalar)
        ),
        "ties.merged": Case(lambda a, b, k: ties.merged([a, b], keep=k), (params, params, scalar)),
        "dare.dropped": Case(lambda d, p, k: dare.dropped(d, drop=p, key=k), (params, scalar, lambda k: k)),
        "keys.at_step": Case(lambda k: jax.random.key_data(keys.at_step(k, 3)), (lambda k: k,)),
        "keys.stream": Case(lambda k: jax.random.key_data(keys.stream(k, "tune")), (lambda k: k,)),
        "optim.unit_schedule": Case(
            optim.unit_schedule(optim.OptimConfig(), total_steps=9), (lambda k: jax.random.randint(k, (), 0, 9),)
        ),
        "gpt.apply": Case(MODEL.apply, (params, tokens)),
        "llama.apply": Case(
            lambda p, t, m: llama.apply(
                p,
                t,
                config=LLAMA,
                mask=m,
                at=jnp.zeros((B, 2), int),
                sites=("mlp.hook_post",),
                layers=(1,),
                positions=jnp.ones((B, 1), int),
                edit=lambda site, layer, positions, h: h * (1 + layer),
            ),
            (llama_params, tokens, mask),
        ),
        "generation.generate": Case(
            lambda p, t, m: generation.generate((p, llama.model(LLAMA)), t, count=3, mask=m, stop=(1,)),
            (llama_params, tokens, mask),
        ),
        "train.make_step": Case(lambda p, b: step(stepping.init_state(p, optimizer), b)[1], (params, batch)),
        "subjects.judge": Case(
            lambda p, c, r, a, b: judge.judge(
                MODEL, p, Trial(c, r, jnp.stack([a, b], 1), unsafe=UNSAFE, last=None, prompt=None)
            ),
            (params, batch, batch, mask, mask),
        ),
        "methods.unlearn": Case(
            lambda p, c, r: bound("unlearn", MODEL, ascent_bound=2.0, **REDUCE)(
                p, PreferenceBatch(c, r, jnp.ones(B, bool))
            ),
            (params, batch, batch),
        ),
        "methods.dpo": Case(
            lambda p, q, c, r: bound("dpo", MODEL, reference=q, **REDUCE)(p, PreferenceBatch(c, r, UNSAFE)),
            (params, params, batch, batch),
        ),
        **{
            f"methods.{name}": Case(
                lambda p, q, c, r, name=name: bound(name, MODEL, reference=q)(p, PreferenceBatch(c, r, UNSAFE)),
                (params, params, batch, batch),
            )
            for name in ("ipo", "robust_dpo", "simpo")
        },
        **{
            f"methods.{name}": Case(
                lambda p, q, c, r, name=name: bound(name, MODEL, reference=q, retain="kl")(
                    p, PreferenceBatch(c, r, MIXED)
                ),
                (params, params, batch, batch),
            )
            for name in ("npo", "simnpo", "graddiff")
        },
        "methods.derta": Case(
            lambda p, c, r: bound("derta", MODEL)(p, PreferenceBatch(c, r, UNSAFE)), (params, batch, batch)
        ),
        "methods.deep_alignment": Case(
            lambda p, c, r: bound("deep_alignment", MODEL)(p, PreferenceBatch(c, r, UNSAFE)), (params, batch, batch)
        ),
        "methods.constrained_sft": Case(
            lambda p, q, c: bound("constrained_sft", MODEL, reference=q)(p, PreferenceBatch(c, None, UNSAFE)),
            (params, params, batch),
        ),
        "methods.rmu": Case(
            lambda p, q, a, c, r: bound("rmu", MODEL, reference=q, aux=a)(p, PreferenceBatch(c, r, UNSAFE)),
            (params, params, words, batch, batch),
        ),
        "methods.circuit_breakers": Case(
            lambda p, q, a, c, r: bound("circuit_breakers", MODEL, reference=q, aux=a, progress=0.5)(
                p, PreferenceBatch(c, r, UNSAFE)
            ),
            (params, params, words, batch, batch),
        ),
        "methods.adversarial": Case(
            lambda p, c, r: bound("adversarial", MODEL, inner_steps=2)(p, PreferenceBatch(c, r, UNSAFE)),
            (params, batch, batch),
        ),
        "methods.tamper_resistant": Case(
            lambda p, c, r: bound("tamper_resistant", MODEL, inner_steps=2)(p, PreferenceBatch(c, r, UNSAFE)),
            (params, batch, batch),
        ),
        "generation.windowed": Case(
            lambda p, t, m: generation.generate((p, MODEL), t, count=3, mask=m.at[:, 0].set(True)),
            (params, tokens, mask),
        ),
        "operators.apply": Case(
            lambda o, x: operators.apply(table, o, x), (lambda k: jax.random.randint(k, (2,), 0, 9), letters)
        ),
        "layout.segments": Case(lambda n: layout.segments(n, window=8), (lambda k: jax.random.randint(k, (), 6, 9),)),
        "layout.outputs": Case(partial(layout.outputs, built), (prompt,)),
        "layout.letter_ids": Case(partial(layout.letter_ids, built), (letters,)),
        "conditions.answers": Case(
            lambda p, u: conditions.answers(built, p, u), (prompt, lambda k: jax.random.bernoulli(k, 0.3, (9,)))
        ),
        "conditions.draw_prompt": Case(
            lambda k: conditions.draw_prompt(built, "jb_co_task", key=k, pcfgs=(0, 1), late_probability=0.1),
            (lambda k: k,),
        ),
        "world.preferences": Case(
            lambda p, u: pair(jax.tree.map(lambda x: x[None], conditions.answers(built, p, u))),
            (prompt, lambda k: jax.random.bernoulli(k, 0.3, (9,))),
        ),
    }


NAMES = sorted(cases(world.load("tiny")))


@pytest.fixture(scope="module")
def table(tiny_world):
    return cases(tiny_world)


def arguments(case, lane):
    draws = jax.random.split(jax.random.key(lane), len(case.arguments))
    return [draw(key) for draw, key in zip(case.arguments, draws, strict=True)]


def compare(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        if jnp.issubdtype(left.dtype, jnp.inexact):
            np.testing.assert_allclose(left, right, rtol=RTOL, atol=ATOL)
        else:
            np.testing.assert_array_equal(left, right)


# Eagerly every operation is a program of its own: 600 that no other test needs.
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_jitted_is_eager(table, name):
    given = arguments(table[name], 0)
    compare(jax.jit(table[name].function)(*given), table[name].function(*given))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_vmapped_is_looped(table, name):
    lanes = [arguments(table[name], lane) for lane in range(LANES)]
    batched = jax.jit(jax.vmap(table[name].function))(*tree.stack(lanes))
    jitted = jax.jit(table[name].function)
    for lane, given in enumerate(lanes):
        compare(tree.lane(batched, lane), jitted(*given))
