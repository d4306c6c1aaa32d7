"""Texts that begin alike, whose beginning is read once: what is said of them is what a whole pass says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.models import gpt
from jaxsafety.models.gpt import GPTConfig
from jaxsafety.models.through import through
from jaxsafety.subjects import judge
from jaxsafety.training import branching
from jaxsafety.types import Batch
from jaxsafety.world import batches, conditions

SAME = 1e-5  # of the largest: sums of float32 in another order
ROUNDED = 2**-8  # of the largest: sums of numbers that were rounded to bfloat16 in another order
SMALL = partial(GPTConfig, vocab_size=11, max_tokens=9, heads=2, width=8)
KINDS = {
    "paper": SMALL(layers=2),
    "paper, learned, one layer": SMALL(layers=1, positions="learned"),
    "pre_ln, rope, a loop": SMALL(layers=3, block="pre_ln", positions="rope", unroll=1),
    "bfloat16": SMALL(layers=2, compute_dtype="bfloat16"),
    "stored in bfloat16": SMALL(layers=2, compute_dtype="bfloat16", stored_dtype="bfloat16"),
}
STEM = 4
TEXTS = np.random.default_rng(0).integers(0, 11, (2, 3, 9), dtype=np.int32)
TEXTS[1, :, :STEM] = TEXTS[0, :, :STEM]
TEXTS = jnp.asarray(TEXTS)
SIDES = tuple(Batch(side, (side + 1) % 11, jnp.indices(side.shape)[1] >= STEM, STEM) for side in TEXTS)


def drawn(config):
    shapes = jax.eval_shape(partial(gpt.init, config), key=jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.device_put(jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 2, shapes))


def close(got, expected, tolerance=SAME):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    "kind", [kind if kind == "paper" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_ends_of_texts_are_those_of_the_whole_texts_and_so_is_the_gradient(kind):
    config = KINDS[kind]
    params, texts = drawn(config), TEXTS.reshape(6, 9)

    def graded(ends):
        run = jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.tanh(found := ends(params))) + 0 * jnp.sum(found)))
        return jax.device_get((jax.jit(ends)(params), run(params)[1]))

    got, gradient = graded(lambda params: gpt.branches(params, TEXTS[0, :, :STEM], texts[:, STEM:], config=config))
    expected, expected_gradient = graded(lambda params: gpt.apply(params, texts, config=config).logits[:, STEM:])
    close(got, expected)
    # As one vector: a bias of keys has no gradient but rounding.
    vectors = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(one)]) for one in (gradient, expected_gradient)
    )
    close(*vectors, SAME if config.compute_dtype == "float32" else ROUNDED)
    embeddings = params["embed"][texts]
    close(gpt.branches(params, embeddings[:3, :STEM], embeddings[:, STEM:], config=config), expected)


def test_a_stem_is_read_once_and_not_at_all_in_the_last_layer():
    config = KINDS["paper"]
    run = jax.jit(partial(gpt.branches, config=config))
    program = run.lower(drawn(config), TEXTS[0, :, :STEM], TEXTS.reshape(6, 9)[:, STEM:]).as_text()
    # 3 stems of 4 tokens and 6 ends of 5: the first MLP reads 42 rows, the last one and the logits 30.
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert [sum(f"-> tensor<{rows}x{width}xf32>" in line for line in products) for rows, width in (
        (42, 32), (30, 32), (30, 11), (54, 32), (42, 11),
    )] == [1, 1, 1, 0, 0]  # fmt: skip


def test_sides_share_the_shortest_stem_of_any_model():
    config = KINDS["paper"]
    params, model = drawn(config), gpt.model(config)
    of_whole = [model.apply(params, side.tokens).logits for side in SIDES]
    plain, adapter = model._replace(branches=None), through(model, lambda half: jax.tree.map(lambda x: 2 * x, half))
    halves = jax.tree.map(lambda x: x / 2, params)
    for one, given in ((model, params), (plain, params), (adapter, halves)):
        for cut in (0, 2, STEM):
            stem, logits = branching.branched(one, given, SIDES[0], SIDES[1].replace(stem=cut))
            assert stem == cut
            for got, expected in zip(logits, of_whole, strict=True):
                close(got, expected[:, cut:])
    assert through(plain, lambda half: half).branches is None


def test_bad_requests_are_named():
    config = KINDS["paper"]
    ask = partial(gpt.branches, drawn(config), config=config)
    with pytest.raises(ValueError, match="rest: got 4 rows, expected a multiple of the 3 stems"):
        ask(TEXTS[0, :, :4], TEXTS.reshape(6, 9)[:4, 4:])
    with pytest.raises(ValueError, match="tokens: got 10 per sequence, expected at most max_tokens 9"):
        ask(TEXTS[0, :, :5], TEXTS[1, :, 4:])
    with pytest.raises(ValueError, match=r"tokens: got 11, expected .* 0 to 10"):
        ask(TEXTS[0, :, :4], jnp.full_like(TEXTS[1, :, 4:], 11))


def test_verdicts_are_those_of_whole_texts(tiny_world):
    config = gpt.preset("tiny", vocab_size=tiny_world.vocab_size, max_tokens=tiny_world.max_tokens)
    model, params = gpt.model(config), drawn(config)
    trial = batches.batch_at(tiny_world, "unsafe", key=jax.random.key(4), step=0, batch_size=16, late_probability=0.5)
    # A fresh model predicts no refusal: every other prompt's is what it predicts.
    said = jnp.argmax(model.apply(params, trial.refused.tokens).logits, axis=-1)
    answered = jnp.where(jnp.arange(16)[:, None] % 2 == 0, said, trial.refused.targets)
    trial = trial.replace(refused=trial.refused.replace(targets=answered))
    run = jax.jit(lambda params, trial: (judge.judge(model, params, trial), judge.refusing(model, params, trial)))
    (rates, once), (expected, whole) = run(params, trial), run(params, branching.whole(trial))
    jax.tree.map(np.testing.assert_array_equal, rates, expected)
    stem = trial.refused.stem
    np.testing.assert_array_equal(once[:, stem:], whole[:, stem:])
    assert not once[:, :stem].any() and np.mean(rates["refused"]) == 0.5


def test_only_drawn_prompts_have_a_stem_and_a_pair_the_shorter_one(tiny_world):
    trial = batches.batch_at(tiny_world, "unsafe", key=jax.random.key(4), step=0, batch_size=2)
    prompt = jax.tree.map(lambda leaf: leaf[0], trial.prompt)
    assert conditions.answers(tiny_world, prompt, jnp.ones(len(tiny_world.spec.task_tokens), bool)).complied.stem == 0
    changed = batches.preferences(trial.replace(complied=trial.complied.replace(stem=3)))
    assert changed.chosen.stem == changed.rejected.stem == 3


@pytest.mark.parametrize("condition", ["safe", "unsafe", "jb_co_task", "jb_misgen"])
def test_both_answers_of_the_world_share_a_stem_of_which_nothing_is_scored(condition, tiny_world):
    trial = batches.batch_at(tiny_world, condition, key=jax.random.key(3), step=0, batch_size=64, late_probability=0.5)
    stem = trial.complied.stem
    # Six letters at least behind five tokens, the text's beginning included.
    assert stem == trial.refused.stem == 12 and int(trial.last.min()) == 12
    for side in (trial.complied, trial.refused):
        assert not side.mask[:, :stem].any()
    np.testing.assert_array_equal(trial.complied.tokens[:, :stem], trial.refused.tokens[:, :stem])
    assert batches.preferences(trial).chosen.stem == stem
