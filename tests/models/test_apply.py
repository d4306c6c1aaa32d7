"""Scored places and edits of the decoders, against whole passes and against the rest of a model run by hand."""

from dataclasses import replace
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety.models import gpt, llama
from jaxsafety.models.llama_block import HIDDEN_SITES
from tests.models.llama_cases import MASK, config_of, params_of, tokens_of

SAME = 1e-5  # of the largest: the same float32 program, fused differently
SITE = "hook_resid_post"
# No positions are added to the embeddings, so the last layer alone is a model of the first one's output.
GPT = gpt.GPTConfig(11, 16, layers=2, heads=2, width=8, mlp_width=12, block="pre_ln", positions="rope", unroll=1)
KINDS = {"gpt": (gpt, GPT), "llama": (llama, config_of())}
STEER = jax.device_put(np.random.default_rng(1).standard_normal(8).astype(np.float32))
TOKENS = tokens_of()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """The module, its configuration, parameters of order one, and the whole pass with its activations."""
    module, config = KINDS[request.param]
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(module.init, config), key=jax.random.key(0))
    params = jax.device_put(jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 2, shapes))
    whole = jax.jit(partial(module.apply, config=config, sites=(SITE,)))(params, TOKENS)
    return module, config, params, jax.device_get(whole)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=SAME * np.abs(expected).max())


def test_logits_at_some_places_are_those_of_the_whole_and_the_only_ones_computed(kind):
    module, config, params, whole = kind
    at = np.asarray([[6, 0, 3, 9], [2, 2, 5, 0], [1, 4, 6, 7]], np.int32)
    run = jax.jit(partial(module.apply, config=config))
    got = np.asarray(run(params, TOKENS, at=at).logits)
    beyond = at >= TOKENS.shape[1]
    assert got.shape == (3, 4, 11) and np.isnan(got[beyond]).all() and beyond.sum() == 2
    expected = np.take_along_axis(whole.logits, np.minimum(at, 6)[..., None], axis=1)
    close(got[~beyond], expected[~beyond])
    program = run.lower(params, TOKENS, at=at).as_text()
    assert "tensor<12x11xf32>" in program and "tensor<21x11xf32>" not in program


def steer(added, site, layer, positions, h):
    """Adds to the first layer's output alone."""
    return h + jnp.where(layer == 0, added, 0.0)[None, None] if site == SITE else h


def by_hand(kind, added):
    """What the last layer gives, run on the first one's output, which is edited in between."""
    module, config, params, whole = kind
    rest = params | {"blocks": jax.tree.map(lambda leaf: leaf[1:], params["blocks"])}
    x = whole.activations[SITE][0] + added[None, None]
    return module.apply(rest, x, config=replace(config, layers=1))


def with_gradient(function):
    """The function as one program that gives, beside its output, the gradient of a sum over its logits."""

    def run(added):
        output = function(added)
        return jnp.sum(jnp.tanh(output.logits)), output

    graded = jax.jit(jax.grad(run, has_aux=True))
    return lambda added: jax.device_get(graded(added))


def test_steering_one_layer_is_the_rest_of_the_model_run_on_what_was_edited(kind):
    module, config, params, whole = kind
    asked = {"config": config, "sites": (SITE,), "layers": (0,)}
    run = with_gradient(lambda added: module.apply(params, TOKENS, **asked, edit=partial(steer, added)))
    gradient, (logits, seen) = run(STEER)
    expected_gradient, expected = with_gradient(partial(by_hand, kind))(STEER)
    close(logits, expected.logits)
    close(seen[SITE][0], whole.activations[SITE][0] + np.asarray(STEER))
    close(module.apply(params, TOKENS, config=config, edit=partial(steer, STEER)).logits, logits)
    assert np.abs(logits - whole.logits).max() > 0.1
    _, unchanged = run(np.zeros_like(STEER))
    close(unchanged.logits, whole.logits)
    close(gradient, expected_gradient)
    assert np.abs(gradient).min() > 1e-3


def test_a_hook_is_called_once_a_layer_at_every_site_in_order_with_a_traced_layer(kind):
    module, config, params, whole = kind
    calls = []

    def note(site, layer, positions, h):
        calls.append((site, h.shape))
        assert isinstance(layer, jax.core.Tracer) and layer.shape == () and layer.dtype == jnp.int32
        assert positions.shape == (3, 7) and positions.dtype == jnp.int32
        return h

    # Not jitted, and yet one call stands for all layers.
    logits, _ = module.apply(params, TOKENS, config=config, edit=note)
    close(logits, whole.logits)
    sites = get_args(module.Site)
    assert calls == [(site, (3, 7, 12 if site in HIDDEN_SITES else 8)) for site in sites]


def test_a_hook_is_told_the_positions_of_the_real_tokens():
    config = config_of()
    given = {"config": config, "sites": ("hook_resid_pre",), "layers": (0,), "mask": jax.device_put(MASK)}

    def tell(site, layer, positions, h):
        return jnp.broadcast_to(positions[..., None], h.shape).astype(h.dtype)

    seen = jax.jit(partial(llama.apply, **given, edit=tell))(params_of(config), TOKENS).activations["hook_resid_pre"]
    np.testing.assert_array_equal(np.asarray(seen)[0, :, :, 0], np.maximum(np.cumsum(MASK, axis=1) - 1, 0))


def test_bad_requests_are_named(kind, unchecked):
    module, config, params, _ = kind
    ask = partial(module.apply, params, config=config)
    for edit, got in ((lambda *given: given[-1][:1], r"float32\[1, 7, 8\]"), (lambda *given: given[-1] > 0, "bool")):
        with pytest.raises(ValueError, match=rf"edit: got {got}.* at hook_resid_pre, expected float32\[3, 7, 8\]"):
            ask(TOKENS, edit=edit)
    for inputs, got in ((TOKENS[0], r"int32\[7\]"), (jnp.ones((3, 7)), r"float32\[3, 7\]")):
        with pytest.raises(ValueError, match=rf"inputs is {got}, expected Integer\[b t\] or Float\[b t d\]"):
            ask(inputs)
    with pytest.raises(ValueError, match=r"inputs: got float32\[3, 7, 1\], expected integer tokens.*\[b, t, 8\]"):
        ask(jnp.ones((3, 7, 1)))
    if module is gpt:
        with pytest.raises(ValueError, match="mask: a GPT attends to padding like any token"):
            ask(TOKENS, mask=TOKENS > 0)
