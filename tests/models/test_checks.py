"""Models that keep the contract pass, adapted ones say what they lack, and every planted fault is named."""

from functools import partial

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.models import generation, gpt, llama
from jaxsafety.models.adapter import adapted
from jaxsafety.models.checks import check_model
from jaxsafety.models.generation import windowed
from jaxsafety.types import Model, Output, Unsupported
from tests.models.llama_cases import config_of, params_of, tokens_of

TOKENS, WINDOW, V, D = tokens_of(2, 6), 8, 11, 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "positions"),
    [
        ("paper", "rope"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("paper", "sinusoidal"), ("pre_ln", "learned"))),
    ],
)
def test_a_gpt_is_a_model_but_for_masks(block, positions):
    config = gpt.GPTConfig(V, WINDOW, 2, 2, width=8, mlp_width=12, block=block, positions=positions, unroll=1)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(gpt.init, config), key=jax.random.key(0))
    params = jax.device_put(jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 2, shapes))
    assert check_model(gpt.model(config), params, tokens=TOKENS) == ("mask",)


@pytest.mark.slow
def test_a_llama_is_a_model():
    config = config_of("window")
    assert check_model(llama.model(config), params_of(config), tokens=TOKENS) == ()


class Bag(flax.linen.Module):
    """Somebody's own model: the mean of what was read so far."""

    @flax.linen.compact
    def __call__(self, tokens):
        x = jnp.cumsum(flax.linen.Embed(V, D)(tokens), axis=1)
        return flax.linen.Dense(V)(jnp.tanh(x))


def test_a_flax_module_is_adapted_in_one_line():
    module = Bag()
    params = jax.jit(module.init)(jax.random.key(0), TOKENS)
    model = adapted(module.apply, max_tokens=WINDOW)
    assert check_model(model, params, tokens=TOKENS) == ("embeddings", "edit", "mask")
    written = jax.jit(lambda params, tokens: generation.generate((params, model), tokens, count=1)[:, 0])
    logits = np.asarray(jax.jit(module.apply)(params, TOKENS))
    np.testing.assert_array_equal(written(params, TOKENS), logits[:, -1].argmax(-1))


LEAVES = {"embed": jax.device_put(np.random.default_rng(0).standard_normal((V, D)).astype(np.float32))}


def embed(params, tokens):
    return params["embed"][tokens]


def of_embeddings(params, x):
    return jnp.cumsum(x, axis=1) @ params["embed"].T


def test_a_plain_function_is_adapted_with_its_embeddings():
    model = adapted(
        lambda params, tokens: of_embeddings(params, embed(params, tokens)), max_tokens=WINDOW, embed=embed,
        of_embeddings=of_embeddings,
    )  # fmt: skip
    assert check_model(model, LEAVES, tokens=TOKENS) == ("edit", "mask")
    with pytest.raises(ValueError, match="tokens: got 9 per sequence, expected at most max_tokens 8"):
        model.apply(LEAVES, tokens_of(2, 9))


def test_what_an_adapted_model_lacks_is_refused_in_one_sentence():
    model = adapted(lambda params, tokens: of_embeddings(params, embed(params, tokens)), max_tokens=WINDOW)
    asked = {"mask": TOKENS > 0, "sites": ("hook_resid_pre",), "edit": lambda site, layer, positions, h: h}
    for name, value in asked.items():
        with pytest.raises(Unsupported, match=f"{name}: this model was adapted from its logits alone"):
            model.apply(LEAVES, TOKENS, **{name: value})
    with pytest.raises(Unsupported, match="takes no embeddings"):
        model.apply(LEAVES, embed(LEAVES, TOKENS))
    with pytest.raises(Unsupported, match="embed: this model has none"):
        model.embed(LEAVES, TOKENS)
    with pytest.raises(ValueError, match="expected both or neither"):
        adapted(of_embeddings, max_tokens=WINDOW, embed=embed)


def toy(fault=""):
    """A model of two layers and two sites that keeps the contract but for one fault."""

    def apply(params, inputs, *, mask=None, at=None, sites=(), layers=None, positions=None, edit=None):
        x = embed(params, inputs) if inputs.ndim == 2 else inputs * (2 if fault == "embeddings" else 1)
        real = jnp.ones(x.shape[:2], bool) if mask is None else mask
        places = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0) + (fault == "positions")
        seen = {"hook_resid_pre": [], "hook_resid_post": []}

        def see(site, layer, h):
            if edit is not None:
                new = edit(site, jnp.int32(layer), places[:1] if fault == "shape of positions" else places, h)
                seen[site].append(h if fault == "capture" else new)
                return h if fault == "edit" and site == "hook_resid_post" else new
            seen[site].append(h)
            return h * (2 if fault == "edit of nothing" else 1)

        for layer in range(2):
            x = see("hook_resid_pre", layer, x)
            read = jnp.where(real[..., None] | (fault == "mask"), x, 0.0)
            mixed = jnp.cumsum(read, axis=1) / (1 + places[..., None])
            mixed = jnp.broadcast_to(mixed[:, -1:], x.shape) if fault == "causality" else mixed
            x = see("hook_resid_post", layer, x + jnp.tanh(mixed))
        scored = x if at is None else jnp.take_along_axis(x, at[..., None] * (fault != "at"), axis=1)
        chosen = range(2) if layers is None or fault == "layers" else layers
        found = {site: jnp.stack([seen[site][layer] for layer in chosen]) for site in sites}
        if positions is not None:
            found = {s: jnp.take_along_axis(h, positions[None, ..., None], axis=2) for s, h in found.items()}
        logits = scored @ params["embed"].T
        return Output(logits.astype(jnp.bfloat16) if fault == "type" else logits, found)

    decoder = plain = windowed(apply, max_tokens=WINDOW)
    if fault == "decoder":
        decoder = plain._replace(extend=lambda params, token, **asked: plain.extend(params, token * 0, **asked))
    if fault == "edit of the decoder":
        decoder = windowed(lambda *given, edit, **asked: apply(*given, **asked), max_tokens=WINDOW)

    def branches(params, stems, rest):
        copies = len(rest) // len(stems)
        ahead = jnp.repeat(stems, copies, axis=0) if fault == "branches" else jnp.tile(stems, (copies, 1))
        return apply(params, jnp.concatenate([ahead, rest], axis=1)).logits[:, stems.shape[1] :]

    return Model(embed, apply, decoder, branches)


def test_the_toy_keeps_the_contract():
    assert check_model(toy(), LEAVES, tokens=TOKENS) == ()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("type", r"logits: got bfloat16\[2, 6, 11\], expected float32\[2, 6, 11\]"),
        ("causality", "logits before a token that was changed: got a difference of .* expected at most 0.0001"),
        ("embeddings", "logits of the embeddings: got a difference"),
        ("at", "logits at two places: got a difference"),
        (
            "layers",
            r"of the last layer at the last place: got float32\[2, 2, 1, 4\], expected float32\[1",
        ),
        ("edit of nothing", "logits with an edit of nothing: got a difference"),
        ("edit", "edit: got logits that do not feel hook_resid_post, expected what the edit returns to flow on"),
        ("capture", "hook_resid_pre of the first layer with an edit that adds 1: got a difference"),
        ("positions", "hook_resid_pre of the first layer with an edit that adds 1: got a difference"),
        ("shape of positions", r"edit: got positions of shape \(1, 6\) at hook_resid_pre, expected \(2, 6\)"),
        ("mask", "logits with padding before the tokens: got a difference"),
        ("decoder", "logits of the decoder: got a difference"),
        ("edit of the decoder", "logits of the decoder with an edit: got a difference"),
        ("branches", "logits of branches: got a difference"),
    ],
)
def test_a_planted_fault_is_named(fault, message):
    with pytest.raises(ValueError, match=message):
        check_model(toy(fault), LEAVES, tokens=TOKENS)


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match=r"tokens: got \[1, 6\], expected at least two rows of four tokens"):
        check_model(toy(), LEAVES, tokens=TOKENS[:1])


def test_a_model_of_one_configuration_is_one():
    """Programs that are compiled for it are found again."""
    for module, config in ((gpt, gpt.GPTConfig(V, WINDOW, layers=1, heads=2, width=D)), (llama, config_of())):
        assert module.model(config) is module.model(config)
