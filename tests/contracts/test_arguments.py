"""What public functions refuse at the entry, in one sentence; and what becomes of it where it is traced."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, losses, world
from jaxsafety.analysis import refusal_depth, uncertainty
from jaxsafety.attacks import prefill, soft_tokens
from jaxsafety.linalg import clusters, masked, power, sensitivity, subspace, svd, update_spaces
from jaxsafety.methods import dpo
from jaxsafety.models import generation, gpt, inputs, llama
from jaxsafety.world import conditions, layout
from tests.contracts import public
from tests.contracts.public import (
    AT,
    BASE,
    BATCH,
    EMBEDDINGS,
    GPT,
    GPT_MODEL,
    GPT_PARAMS,
    KEY,
    LLAMA,
    LLAMA_MODEL,
    LLAMA_PARAMS,
    LOGITS,
    LOGPROBS,
    MASK,
    PLACES,
    REFUSED,
    TARGETS,
    T,
    V,
)  # fmt: skip
from tests.contracts.public_parts import TINY

FAR = np.full_like(TARGETS, V)
OUT = np.full((3, 1), T)
apply = partial(gpt.apply, GPT_PARAMS, config=GPT)
llama_apply = partial(llama.apply, LLAMA_PARAMS, config=LLAMA)
written = partial(generation.generate, (GPT_PARAMS, GPT_MODEL), count=2)

REFUSALS = {
    "a block of another name": (
        lambda: layout.block_mask(jnp.zeros(3, int), "foo"),
        "block: got 'foo', expected 0 or 1",
    ),
    "prompts that share no text": (
        lambda: conditions.draw_alike(
            TINY, [conditions.CONDITIONS[name] for name in ("safe", "ood")], key=KEY, pcfgs=(0,), late_probability=0.1
        ),
        "conditions: got .*, expected those of the same texts",
    ),
    "no prompts": (
        lambda: world.mixed_at(TINY, key=KEY, step=0, batch_size=0, p_unsafe=0.5, mix="prompt"),
        "batch_size: got 0, expected at least 1",
    ),
    "half a seed": (lambda: keys.root(1.5), "a seed must be a whole number, got 1.5"),
    "a truth for a seed": (lambda: keys.root(True), "a seed must be a whole number, got True"),
    "two seeds": (lambda: keys.root(np.array([1, 2])), "a seed must be a whole number, got"),
    "a step before the first": (lambda: keys.at_step(KEY, -1), "step: got -1, expected at least 0"),
    "a stream": (lambda: keys.stream(KEY, "tun"), "unknown stream 'tun': expected one of .*; did you mean 'tune'"),
    "a number for a name": (lambda: keys.named(KEY, 3), "name of a stream: got 3, expected a string"),
    "one stop": (lambda: written(TARGETS, stop=3), "stop: got 3, expected a tuple of tokens"),
    "a text of padding": (
        lambda: written(TARGETS, mask=np.array([[True] * T, [False] * T, [True] * T])),
        "mask: prompt 1 has no real token, expected at least one in each",
    ),
    "a number for many": (lambda: losses.nll(0.5, MASK), r"^nll: logprobs is a float, expected Float\[\*b t\]"),
    "nothing for an array": (lambda: losses.nll(None, MASK), r"^nll: logprobs is a NoneType, expected Float"),
    "one flag for a mask": (
        lambda: losses.masked_sum(np.ones(2, np.float32), True),
        r"^masked_sum: mask is a bool, expected Bool\[\*b\]",
    ),
    "a name": (
        lambda: losses.sequence_logprobs(LOGPROBS, MASK, reduction="Sum"),
        r"^unknown reduction 'Sum': expected one of sum, mean; did you mean 'sum'\?$",
    ),
    "a mask of one row": (
        lambda: losses.nll(LOGPROBS, MASK[0]),
        r"nll: mask is bool\[4\], expected Bool\[\*b t\] beside logprobs float32\[3, 4\]",
    ),
    "weights for a mask": (
        lambda: losses.sequence_logprobs(LOGPROBS, 2.0 * MASK, reduction="sum"),
        r"sequence_logprobs: mask is float64\[3, 4\], expected Bool\[b t\]",
    ),
    "a list": (lambda: losses.masked_sum([1.0, 2.0], np.ones(2, bool)), r"values is a list, expected Float\[\*b\]"),
    "targets that are no tokens": (lambda: losses.token_logprobs(LOGITS, LOGPROBS), r"targets is float32\[3, 4\]"),
    "accuracy of numbers": (lambda: losses.token_accuracy(LOGPROBS, MASK), r"ok is float32\[3, 4\], expected Bool"),
    "means by weights": (lambda: masked.averaged(LOGPROBS, 1.0 * MASK), r"averaged: weights is float64"),
    "means of other samples": (
        lambda: masked.averaged(LOGPROBS, MASK[:, :2]),
        r"weights have shape \(3, 2\), expected",
    ),
    "margins of other pairs": (
        lambda: dpo.dpo(np.ones(3), np.ones(2), weight_chosen=1.0, weight_rejected=1.0),
        r"dpo: margin_rejected is float64\[2\], expected Float\[b\] beside margin_chosen float64\[3\]",
    ),
    "a prompt of another batch": (
        lambda: sensitivity.gradient_norm(public.HEAD, EMBEDDINGS, **PLACES | {"prompt": MASK[:2]}),
        r"prompt is bool\[2, 4\], expected Bool\[b t\]",
    ),
    "means of other neurons": (
        lambda: clusters.tau(public.SAFE, clusters.Centroids(np.ones((2, 5)), np.ones((2, 6)))),
        r"safe mean has shape \(2, 5\), expected \(2, 6\)",
    ),
    "a basis of another space": (
        lambda: subspace.projection_energy(public.VECTORS, np.eye(5)[None]),
        r"basis is float64\[1, 5, 5\]",
    ),
    "answers with weights": (
        lambda: prefill.prefilled(BATCH, REFUSED.replace(mask=1.0 * MASK), depth=0),
        r"refused has tokens \(3, 4\), targets \(3, 4\), float64 mask \(3, 4\): expected one shape, and a mask",
    ),
    "predictions of other prompts": (
        lambda: refusal_depth.first_refusal(TARGETS[0], complied=BATCH, refused=REFUSED),
        r"first_refusal: predicted is int32\[4\], expected Integer\[b t\]",
    ),
    "fewer places than none": (
        lambda: uncertainty.halves(MASK, count=-1, key=KEY),
        "count: got -1, expected at least 0",
    ),
    "places with weights": (
        lambda: uncertainty.replaced(TARGETS, 1.0 * MASK, by=np.ones(V, bool), key=KEY),
        r"replaced: places is float64\[3, 4\], expected Bool\[b t\]",
    ),
    "a place behind the window": (
        lambda: soft_tokens.insert(EMBEDDINGS, EMBEDDINGS, at=AT + 1, count=1),
        "at: got 4, expected from 0 to 3",
    ),
    "a place before the window": (lambda: soft_tokens.fits(MASK, at=AT - 2, count=1), "at: got -1, expected from 0"),
    "a token beyond the vocabulary": (lambda: apply(FAR), "tokens: got 5, expected from 0 to 4, the vocabulary"),
    "a token below zero": (lambda: inputs.embed(GPT_PARAMS, -TARGETS - 1), "tokens: got -.*, expected from 0 to 4"),
    "logits behind the end": (lambda: apply(TARGETS, at=OUT), "at: got 4, expected from 0 to 3, a place of the seq"),
    "logits before the start": (lambda: llama_apply(TARGETS, at=-OUT), "at: got -4, expected from 0 to 3"),
    "activations nowhere": (lambda: apply(TARGETS, positions=OUT, sites=("mlp.hook_in",)), "positions: got 4"),
    "padding of another shape": (
        lambda: llama_apply(TARGETS, mask=MASK[0]),
        r"apply: mask is bool\[4\], expected Bool",
    ),
    "a text beyond the vocabulary": (lambda: written(FAR), "tokens: got 5, expected from 0 to 4, the vocabulary"),
    "a text padded otherwise": (lambda: written(TARGETS, mask=MASK[:2]), r"generate: mask is bool\[2, 4\], expected"),
    "a temperature of zero": (
        lambda: written(TARGETS, key=KEY, temperature=np.float32(0)),
        "temperature: got 0.0, expected a number greater",
    ),
    "half a direction": (lambda: svd.decompose(BASE, rank=1.5), "rank: got 1.5, expected a whole number"),
    "a rank that is traced": (
        lambda: jax.eval_shape(lambda rank: svd.decompose(BASE, rank=rank), 1),
        "rank: got a value that is traced",
    ),
    "an energy, before anything is decomposed": (
        lambda: update_spaces.output_space(BASE, BASE, energy=90.0),
        r"energy: got 90.0, expected a share in \(0, 1\]",
    ),
    "an iteration of none": (
        lambda: power.largest_singular_value(public.SQUARES, np.ones(4), key=KEY, iterations=0),
        "iterations: got 0",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_one_sentence_at_the_entry(name, unchecked):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()[0]) < 200


def test_traced_places_and_tokens_out_of_range_are_what_is_said(unchecked):
    logits = jax.jit(lambda at: apply(TARGETS, at=at).logits)
    assert np.isnan(logits(OUT)).all() and np.isnan(logits(-OUT)).all() and np.isfinite(logits(OUT - 1)).all()
    run = jax.jit(lambda tokens: apply(tokens).logits)
    np.testing.assert_array_equal(run(FAR), run(FAR - 1))
    targets = np.array([[0, V, -1, -100]])
    found = losses.token_logprobs(LOGITS[:1], targets)
    np.testing.assert_array_equal(np.isnan(found), [[False, True, True, True]])


def test_ids_under_padding_are_anybodys(unchecked):
    """In every place that takes a mask, on a loaded device as in NumPy."""
    far = np.where(MASK, TARGETS, 99)
    real = llama_apply(TARGETS, mask=MASK).logits
    np.testing.assert_array_equal(llama_apply(jnp.asarray(far), mask=MASK).logits[MASK], real[MASK])
    source = (LLAMA_PARAMS, LLAMA_MODEL)
    found, expected = (generation.generate(source, tokens, count=2, mask=MASK) for tokens in (far, TARGETS))
    np.testing.assert_array_equal(found, expected)


def test_sums_of_halves_are_float32():
    """Of 4096 equal terms, bfloat16 would stop at 256 times the first."""
    halves, every = jnp.full((1, 4096), -1.0, jnp.bfloat16), jnp.ones((1, 4096), bool)
    assert losses.nll(halves, every) == (4096, 4096) == losses.masked_sum(-halves, every)
    assert losses.sequence_logprobs(halves, every, reduction="sum") == -4096
    assert losses.summed(halves[0])[0] == -4096
    assert masked.averaged(halves, every) == -1 and masked.averaged(halves, every).dtype == jnp.float32


def test_a_function_is_asked_again_as_what_it_closes_over_may_have_changed(unchecked):
    """But what a Partial holds is an argument: other values of it are the same program."""
    scale = 1.0
    given = {"position": np.zeros(1, int), "prompt": np.ones((1, 1), bool)}

    def forward(x):
        return scale * x

    def measured(model):
        return float(sensitivity.gradient_norm(model, np.ones((1, 1, 2)), **given)[0])

    first, scale = measured(forward), 3.0
    assert (first, measured(forward)) == (1.0, 3.0)
    times = jax.tree_util.Partial(jnp.multiply, 1.0)
    assert [measured(times), measured(jax.tree_util.Partial(jnp.multiply, 3.0))] == [1.0, 3.0]


def test_probabilities_of_a_draw_are_such():
    for name, draw in {
        "late_probability": partial(world.batch_at, TINY, "unsafe", late_probability=1.5),
        "p_unsafe": partial(world.mixed_at, TINY, mix="prompt", p_unsafe=-0.1),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\], got"):
            draw(key=KEY, step=0, batch_size=1)
