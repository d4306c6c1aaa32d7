"""Whether a model is what :class:`jaxsafety.types.Model` says, so that a model of your own can be relied on.

One function, which runs the model on a few tokens and compares its answers with each other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsafety.types import Model, Output, Unsupported

# Of the largest value: the same float32 sums in another order, through the layers of a model.
TOLERANCE = 1e-4


def check_model(model: Model, params: Any, *, tokens: Int[Any, "b t"]) -> tuple[str, ...]:
    """Checks that a model keeps the contract on some tokens, but for parts that it refuses as unsupported.

    Shapes and types; that it is causal; that tokens are their embeddings; that an edit of nothing changes nothing, and
    that any other is felt and captured at every site; that ``at``, ``layers`` and ``positions`` pick from the whole;
    that padding changes no real token; that its decoder says of prompts of two lengths what whole passes say, edited
    and not, and so do its branches, where it has them. It must compute in float32, its decoder's cache included, with
    parameters large enough for the logits to depend on every layer; ``tokens`` are at least two rows of four.

    Returns:
        What it refuses: among ``"embeddings"``, ``"edit"`` (and with it sites, whose names its calls give), ``"mask"``.

    Raises:
        ValueError: a part does not hold; one sentence says what was got and what is expected.
    """
    tokens, lacks, whole = np.asarray(tokens, np.int32), [], {}
    if tokens.ndim != 2 or len(tokens) < 2 or tokens.shape[1] < 4:
        raise ValueError(f"tokens: got {list(tokens.shape)}, expected at least two rows of four tokens")
    logits = _check_tokens(model, params, tokens)
    checks = {"embeddings": _check_embeddings, "edit": _check_edit, "mask": _check_mask}
    for name, check in checks.items():
        try:
            whole |= check(model, params, tokens, logits) or {}
        except Unsupported:
            lacks.append(name)
    _check_picks(model, params, tokens, logits, whole)
    for edit in (None, _grow) if whole else (None,):
        _check_decoder(model, params, tokens, edit)
    if model.branches is not None:
        _check_branches(model, params, tokens, logits)
    return tuple(lacks)


def _check_tokens(model, params, tokens):
    """Returns the logits."""
    run = jax.jit(lambda params, tokens: model.apply(params, tokens).logits)
    logits = run(params, tokens)
    _expect("logits", logits, shape=(*tokens.shape, logits.shape[-1]))
    half = tokens.shape[1] // 2
    # A permutation of tokens that are there keeps to the vocabulary.
    changed = run(params, np.concatenate([tokens[:, :half], tokens[::-1, half:]], axis=1))
    _expect("logits before a token that was changed", changed[:, :half], logits[:, :half])
    return np.asarray(logits)


def _check_embeddings(model, params, tokens, logits):
    embeddings = model.embed(params, jnp.asarray(tokens))
    _expect("embeddings", embeddings, shape=(*tokens.shape, embeddings.shape[-1]))
    found = jax.jit(lambda params, given: model.apply(params, given).logits)(params, embeddings)
    _expect("logits of the embeddings", found, logits)


def _check_edit(model, params, tokens, logits):
    """Returns the activations at all sites."""
    sites = _sites(model, params, tokens)

    @jax.jit
    def run(params: Any, added: Array) -> Output:
        def edit(site: str, layer: Array, positions: Array, h: Array) -> Array:
            own = added[sites.index(site)] * (layer == 0) * (positions == jnp.arange(h.shape[1])[None])
            return h + own[..., None] * _bump(h)

        return model.apply(params, jnp.asarray(tokens), sites=sites, edit=edit)

    same, whole = run(params, np.zeros(len(sites), np.float32))
    _expect("logits with an edit of nothing", same, logits)
    if set(whole) != set(sites):
        raise ValueError(f"activations: got those of {sorted(whole)}, expected {sorted(sites)}")
    for i, site in enumerate(sites):
        _expect(site, whole[site], shape=(len(whole[site]), *tokens.shape, whole[site].shape[-1]))
        found, after = run(params, np.eye(len(sites), dtype=np.float32)[i])
        expected = whole[site][0] + _bump(whole[site][0])
        _expect(f"{site} of the first layer with an edit that adds 1", after[site][0], expected)
        if _distance(found, logits) <= TOLERANCE:
            raise ValueError(f"edit: got logits that do not feel {site}, expected what the edit returns to flow on")
    return whole


def _check_mask(model, params, tokens, logits):
    run = jax.jit(lambda params, tokens, mask: model.apply(params, tokens, mask=mask).logits)
    real = np.ones(tokens.shape, bool)
    _expect("logits with a mask of real tokens", run(params, tokens, real), logits)
    real[:, -2:] = False
    for name, shift in (("after", 0), ("before", 2)):
        found = np.asarray(run(params, *(np.roll(given, shift, axis=1) for given in (tokens, real))))
        _expect(f"logits with padding {name} the tokens", np.roll(found, -shift, axis=1)[:, :-2], logits[:, :-2])


def _check_picks(model, params, tokens, logits, whole):
    depth = max(map(len, whole.values()), default=0)
    asked = {"sites": tuple(whole), "layers": (depth - 1,)} if whole else {}
    at = np.tile(np.asarray([[tokens.shape[1] - 1, 0]], np.int32), (len(tokens), 1))
    run = jax.jit(lambda params, tokens, at: model.apply(params, tokens, at=at, positions=at[:, :1], **asked))
    found, seen = run(params, tokens, at)
    _expect("logits at two places", found, np.take_along_axis(logits, at[..., None], axis=1))
    for site, values in seen.items():
        _expect(f"{site} of the last layer at the last place", values, whole[site][-1:, :, -1:])


def _check_decoder(model, params, tokens, edit):
    @jax.jit
    def run(params: Any, prompts: Array, mask: Array) -> tuple[Array, Array]:
        first, state = model.decoder.begin(params, prompts, mask=mask, room=1, edit=edit)
        token = jnp.argmax(first, axis=-1).astype(jnp.int32)
        second, _ = model.decoder.extend(params, token, state=state, edit=edit)
        text = jnp.pad(prompts, ((0, 0), (0, 1))).at[jnp.arange(len(token)), lengths].set(token)
        whole = model.apply(params, text, edit=edit).logits
        places = jnp.asarray(lengths)[:, None] + jnp.asarray([[-1, 0]])
        return jnp.stack([first, second], axis=1), jnp.take_along_axis(whole, places[..., None], axis=1)

    # The last token is the decoder's own, so that no model need take more of them than were given.
    length = tokens.shape[1] - 1
    lengths = length - np.arange(len(tokens)) % 2
    found, expected = run(params, tokens[:, :length], np.arange(length)[None] < lengths[:, None])
    _expect("logits of the decoder" + (" with an edit" if edit else ""), found, expected)


def _check_branches(model, params, tokens, logits):
    half = tokens.shape[1] // 2
    found = jax.jit(model.branches)(params, tokens[:, :half], np.concatenate([tokens, tokens])[:, half:])
    _expect("logits of branches", found, np.concatenate([logits, logits])[:, half:])


def _sites(model: Model, params: Any, tokens: np.ndarray) -> tuple[str, ...]:
    """The names that a hook is called with, by tracing alone."""
    seen: dict[str, None] = {}

    def note(site: str, layer: Array, positions: Array, h: Array) -> Array:
        seen[site] = None
        if positions.shape != h.shape[:2]:
            raise ValueError(f"edit: got positions of shape {positions.shape} at {site}, expected {h.shape[:2]}")
        return h

    jax.eval_shape(lambda params, tokens: model.apply(params, tokens, edit=note).logits, params, tokens)
    return tuple(seen)


def _bump(h: Array) -> Array:
    """1 in every second channel: norms do not see what is added to all of them."""
    return jnp.broadcast_to((jnp.arange(h.shape[-1]) % 2 == 0).astype(h.dtype), h.shape)


def _grow(site: str, layer: Array, positions: Array, h: Array) -> Array:
    """An edit that depends on the position, so that one which is not the true one is noticed."""
    return h + positions[..., None].astype(h.dtype) * _bump(h)


def _distance(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def _expect(what: str, found: Any, expected: Any = None, *, shape: tuple[int, ...] | None = None) -> None:
    shape = np.shape(expected) if shape is None else shape
    if found.shape != shape or found.dtype != jnp.float32:
        raise ValueError(f"{what}: got {found.dtype}{list(found.shape)}, expected float32{list(shape)}")
    # Not finite is not close.
    if expected is not None and not (far := _distance(found, expected)) <= TOLERANCE:
        raise ValueError(f"{what}: got a difference of {far:.3g} of the largest, expected at most {TOLERANCE:g}")
