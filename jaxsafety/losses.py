"""Array maths that the methods share: logits, targets and masks in, numbers out. No model, no world.

Reductions return ``(sum, count)``; the quotient is taken once, over the global batch, so that microbatches and
devices never change a result. Everything is float32 (float64 of float64), whatever the logits' dtype. A mask has the
shape of what it masks, and is boolean; whatever stands where it does not hold, a NaN or a target beyond the vocabulary
too, changes neither a value nor a gradient. Other shapes and types are a ValueError that names the argument. Verdicts
(:func:`correct`, :func:`exact_match`, :func:`token_accuracy`) have no gradient.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety.entry.annotations import checked

Reduction = Literal["sum", "mean"]
SumCount = tuple[Float[Array, ""], Float[Array, ""]]


@checked
def token_logprobs(logits: Float[Array, "*b t v"], targets: Int[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Log-probability of every target token, ``log softmax(logits)[target]``, in nats: float32, at most 0.

    NaN, without a gradient, where the target is outside of ``[0, v)`` or the largest logit is not finite; a logit of
    ``-inf`` is a token that is never said.
    """
    logits = _wide(logits)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    known = jnp.isfinite(peak) & (targets >= 0) & (targets < logits.shape[-1])
    # Before and after: the gradient of a value that is not used would be zero times what is not finite.
    logits = jnp.where(known[..., None], logits, 0.0)
    peak = jnp.where(known, peak, 0.0)
    chosen = jnp.take_along_axis(logits, jnp.where(known, targets, 0)[..., None], axis=-1)[..., 0]
    total = jnp.log(jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)) + peak
    return jnp.where(known, chosen - total, jnp.nan)


@checked
def entropy(logits: Float[Array, "*b v"]) -> Float[Array, "*b"]:
    """Entropy of the next token, ``-sum p log p`` with ``p = softmax(logits)``, in nats: in [0, log v].

    NaN where the largest logit is not finite; a logit of ``-inf``, a token that is never said, adds nothing.
    """
    logprobs = jax.nn.log_softmax(_wide(logits), axis=-1)
    # Zero times minus infinity, in the gradient too.
    return -jnp.sum(jnp.exp(logprobs) * jnp.where(logprobs == -jnp.inf, 0.0, logprobs), axis=-1)


@checked
def divergence(
    logits: Float[Array, "*b v"], reference: Float[Array, "*b v"], mask: Bool[Array, "*b"]
) -> SumCount:  # fmt: skip
    """Divergence of the next token from a reference's, ``KL(reference || policy)`` in nats, and how many there are.

    ``logits`` are the policy's, ``reference`` log-probs; it is summed where ``mask`` holds. A token that the reference
    never says (``-inf``) adds nothing, one that the policy alone never says makes it infinite.
    """
    # Before and after: the gradient of a value that is not used would be zero times what is not finite.
    policy = jax.nn.log_softmax(jnp.where(mask[..., None], _wide(logits), 0.0), axis=-1)
    said = mask[..., None] & (reference > -jnp.inf)
    reference = jnp.where(said, _wide(reference), 0.0)
    each = jnp.where(said, jnp.exp(reference) * (reference - jnp.where(said, policy, 0.0)), 0.0)
    return masked_sum(jnp.sum(each, axis=-1), mask)


@checked
def masked_sum(values: Float[Array, "*b"], mask: Bool[Array, "*b"]) -> SumCount:
    """Returns the sum of ``values`` where ``mask`` holds, and how many there are."""
    return jnp.sum(jnp.where(mask, _wide(values), 0.0)), jnp.sum(mask, dtype=jnp.float32)


@checked
def summed(values: Float[Array, " b"]) -> SumCount:
    """Returns the sum of what there is one of for every example, and the number of examples."""
    return jnp.sum(_wide(values)), jnp.float32(values.shape[0])


@checked
def quotient(total: Float[Array, "*b"], count: Float[Array, ""]) -> Float[Array, "*b"]:
    """Returns ``total / count``, and 0 where nothing was counted."""
    return total / jnp.maximum(count, 1.0)


@checked
def nll(logprobs: Float[Array, "*b t"], mask: Bool[Array, "*b t"]) -> SumCount:
    """Negative log-likelihood in nats summed over the scored tokens, and their number."""
    return masked_sum(-_wide(logprobs), mask)


@checked
def bounded(logprobs: Float[Array, "*b t"], *, bound: float | Float[Array, ""]) -> Float[Array, "*b t"]:
    """Log-probabilities no lower than ``-bound`` nats, for gradient ascent on the NLL that cannot blow up.

    A token already less likely than ``exp(-bound)`` has no gradient, one as likely half of it. ``bound = inf`` changes
    nothing.

    Fidelity: the paper's ascent has no bound (``inf``).
    """
    logprobs = _wide(logprobs)
    return jnp.maximum(logprobs, jnp.asarray(-bound, logprobs.dtype))


@checked
def sequence_logprobs(
    logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"], *, reduction: Reduction
) -> Float[Array, " b"]:
    """Log-probability of each response in nats, summed over its scored tokens or averaged (``mean``, per token)."""
    total = jnp.sum(jnp.where(mask, _wide(logprobs), 0.0), axis=-1)
    if reduction == "sum":
        return total
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


@checked
def correct(logits: Float[Array, "*b t v"], targets: Int[Array, "*b t"]) -> Bool[Array, "*b t"]:
    """Returns where the most likely token is the target."""
    return jnp.argmax(logits, axis=-1) == targets


@checked
def exact_match(ok: Bool[Array, "*b t"], mask: Bool[Array, "*b t"]) -> Bool[Array, "*b"]:
    """Returns whether every scored token is right; a sequence with nothing scored counts as right.

    Teacher-forced exact match of a whole block equals greedy decoding emitting exactly that block.
    """
    return jnp.all(ok | ~mask, axis=-1)


@checked
def token_accuracy(ok: Bool[Array, "*b t"], mask: Bool[Array, "*b t"]) -> Float[Array, "*b"]:
    """Share of scored tokens that are right, in [0, 1]; 0 where nothing is scored."""
    return jnp.sum(ok & mask, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def _wide(values: Array) -> Array:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
