"""What of a model is trained: adapters and gates against NumPy, and that nothing is changed before the first step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsafety import keys, parametrisations, tree
from jaxsafety.models import gpt
from jaxsafety.parametrisations import lora, mask

# Products of matrices of 16 and sums of thousands of numbers in float32.
RTOL, ATOL = 2e-5, 1e-6


@pytest.fixture(scope="module")
def trees(tiny_config, tiny_gpt):
    base = jax.jit(lambda key: gpt.init(tiny_config, key=key))(keys.root(2))
    return {"parent": tiny_gpt, "base": base}


def host(params):
    return {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}


def close(params, expected):
    for path, leaf in host(params).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=RTOL, atol=ATOL, err_msg=path)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_nothing_has_changed_before_the_first_step(trees, key, name):
    part = parametrisations.load(name)
    trained = part.init(trees, config=part.Config(), key=key)
    close(part.join(trees, trained, config=part.Config()), host(trees["parent"]))


def test_an_adapter_adds_a_product_to_its_matrices_alone(trees, key):
    config = lora.Config(rank=2, alpha=6.0, targets=("q", "down"))
    trained = jax.tree.map(lambda leaf: leaf + 0.1, lora.init(trees, config=config, key=key))
    assert set(tree.flatten(trained)) == {
        f"blocks/{place}_lora_{side}" for place in ("attn/q", "mlp/down") for side in "ab"
    }
    expected, factors = host(trees["parent"]), host(trained)
    for path in ("blocks/attn/q", "blocks/mlp/down"):
        expected[path] = expected[path] + 3.0 * factors[f"{path}_lora_a"] @ factors[f"{path}_lora_b"]
    joined = jax.jit(lambda trained: lora.join(trees, trained, config=config))(trained)
    close(joined, expected)
    update = np.asarray(joined["blocks"]["attn"]["q"] - trees["parent"]["blocks"]["attn"]["q"])
    assert (np.linalg.matrix_rank(update, tol=1e-4) <= 2).all()


@pytest.mark.parametrize("per", ["entry", "row", "leaf"])
@pytest.mark.parametrize("rescale", [True, False])
def test_gates_scale_the_update_by_their_mean(trees, key, per, rescale):
    config = mask.Config(per=per, rescale=rescale, scale=0.5)
    start = mask.init(trees, config=config, key=key)
    trained = tree.label(
        start, lambda path, leaf: leaf + len(path) / 10 + jnp.arange(leaf.size).reshape(leaf.shape) % 3
    )
    parent, base = host(trees["parent"]), host(trees["base"])
    gates = {path: np.broadcast_to(1 / (1 + np.exp(-leaf)), parent[path].shape) for path, leaf in host(trained).items()}
    mean = sum(gate.sum() for gate in gates.values()) / sum(gate.size for gate in gates.values())
    factor = 0.5 / mean if rescale else 0.5
    expected = {path: base[path] + factor * gates[path] * (parent[path] - base[path]) for path in base}
    close(jax.jit(lambda trained: mask.join(trees, trained, config=config))(trained), expected)


def test_there_is_a_gate_for_every_entry_row_or_layer(trees, key):
    shapes = {
        per: {
            path: leaf.shape
            for path, leaf in tree.flatten(mask.init(trees, config=mask.Config(per=per), key=key)).items()
        }
        for per in ("entry", "row", "leaf")
    }
    found = {per: (own["blocks/mlp/up"], own["blocks/mlp/up_bias"], own["embed"]) for per, own in shapes.items()}
    vocab = trees["parent"]["embed"].shape[0]
    assert found == {
        "entry": ((2, 16, 64), (2, 64), (vocab, 16)),
        "row": ((2, 16, 1), (2, 1), (vocab, 1)),
        "leaf": ((2, 1, 1), (2, 1), (1, 1)),
    }


def test_gates_that_are_drawn_are_those_of_the_concrete_distribution(key):
    """Of one large leaf: the share above one half is the sigmoid of the logit, whatever the temperature."""
    trees = {"parent": {"w": jnp.ones((200, 200))}, "base": {"w": jnp.zeros((200, 200))}}
    logit = 0.7
    trained = {"w": jnp.full((200, 200), logit)}
    config = mask.Config(temperature=0.2, rescale=False)
    gates = np.asarray(mask.join(trees, trained, config=config, key=key)["w"])
    share = 1 / (1 + np.exp(-logit))
    # Forty thousand draws: five standard errors.
    assert abs((gates > 0.5).mean() - share) < 5 * np.sqrt(share * (1 - share) / gates.size)
    still = np.asarray(mask.join(trees, trained, config=mask.Config(noise=False, rescale=False), key=key)["w"])
    np.testing.assert_allclose(still, 1 / (1 + np.exp(-logit / 0.5)), rtol=RTOL)


def test_what_is_kept_may_be_cut_at_one_half_or_drawn(key):
    trees = {"parent": {"w": jnp.ones((200, 200))}, "base": {"w": jnp.zeros((200, 200))}}
    logits = jnp.where(jnp.arange(200) < 150, 0.7, -0.7)[:, None] * jnp.ones((1, 200))

    def joined(kept):
        return np.asarray(mask.join(trees, {"w": logits}, config=mask.Config(kept=kept, rescale=False))["w"])

    np.testing.assert_array_equal(joined("hard"), np.asarray(logits) > 0)
    drawn, share = joined("sampled"), 1 / (1 + np.exp(-0.7))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    for rows, expected in ((drawn[:150], share), (drawn[150:], 1 - share)):
        assert abs(rows.mean() - expected) < 5 * np.sqrt(share * (1 - share) / rows.size)
    np.testing.assert_array_equal(joined("sampled"), drawn)
    np.testing.assert_allclose(joined("expected")[0], share, rtol=RTOL)
    shuffled = joined("shuffled")
    np.testing.assert_array_equal(np.sort(shuffled, axis=None), np.sort(joined("expected"), axis=None))
    assert abs((shuffled[:150] > 0.5).mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / shuffled[:150].size)


def test_of_gates_that_are_all_shut_nothing_is_left():
    trees = {"parent": {"w": jnp.ones((2, 2))}, "base": {"w": jnp.full((2, 2), 0.5)}}
    found = mask.join(trees, {"w": jnp.full((2, 2), -1.0)}, config=mask.Config(kept="hard"))
    np.testing.assert_array_equal(found["w"], trees["base"]["w"])


gated = partial(mask.gated, scale=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora.Config(rank=0), "rank must be >= 1 and finite, got 0"),
        (lambda: lora.Config(targets=("qq",)), "unknown target of an adapter 'qq': expected one of q, k, v, o"),
        (lambda: lora.Config(targets=()), "targets must name distinct matrices"),
        (lambda: mask.Config(temperature=0.0), "temperature must be > 0 and finite, got 0.0"),
        (
            lambda: gated({"w": np.ones(2)}, {"v": np.ones(2)}),
            "v is in gates but not in delta: expected trees of the same",
        ),
        (
            lambda: gated({"w": np.ones((2, 3))}, {"w": np.ones((2, 1, 1))}),
            r"gates: w has shape \(2, 1, 1\), expected one that broadcasts to \(2, 3\)",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
