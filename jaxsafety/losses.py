"""Array maths that the methods share: logits, targets and masks in, numbers out. No model, no world.

Reductions return ``(sum, count)``; the quotient is taken once, over the global batch, so that microbatches and
devices never change a result. Everything is float32, whatever the logits' dtype.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Reduction = Literal["sum", "mean"]
SumCount = tuple[Float[Array, ""], Float[Array, ""]]


def token_logprobs(logits: Float[Array, "*b t v"], targets: Int[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Log-probability of every target token, ``log softmax(logits)[target]``, in nats: float32, at most 0."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def masked_sum(values: Float[Array, "*b"], mask: Bool[Array, "*b"]) -> SumCount:
    """Returns the sum of ``values`` where ``mask`` holds, and how many there are."""
    return jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def summed(values: Float[Array, " b"]) -> SumCount:
    """Returns the sum of what there is one of for every example, and the number of examples."""
    return jnp.sum(values), jnp.float32(values.shape[0])


def quotient(total: Float[Array, "*b"], count: Float[Array, ""]) -> Float[Array, "*b"]:
    """Returns ``total / count``, and 0 where nothing was counted."""
    return total / jnp.maximum(count, 1.0)


def nll(logprobs: Float[Array, "*b t"], mask: Bool[Array, "*b t"]) -> SumCount:
    """Negative log-likelihood in nats summed over the scored tokens, and their number."""
    chex.assert_equal_shape([logprobs, mask])
    return masked_sum(-logprobs, mask)


def bounded(logprobs: Float[Array, "*b t"], *, bound: float | Float[Array, ""]) -> Float[Array, "*b t"]:
    """Log-probabilities no lower than ``-bound`` nats, for gradient ascent on the NLL that cannot blow up.

    A token already less likely than ``exp(-bound)`` has no gradient. ``bound = inf`` changes nothing.

    Fidelity: the paper's ascent has no bound (``inf``).
    """
    return jnp.maximum(logprobs, -bound)


def sequence_logprobs(
    logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"], *, reduction: Reduction
) -> Float[Array, " b"]:
    """Log-probability of each response in nats, summed over its scored tokens or averaged (``mean``, per token)."""
    total = jnp.sum(jnp.where(mask, logprobs, 0.0), axis=-1)
    if reduction == "sum":
        return total
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def correct(logits: Float[Array, "*b t v"], targets: Int[Array, "*b t"]) -> Bool[Array, "*b t"]:
    """Returns where the most likely token is the target."""
    return jnp.argmax(logits, axis=-1) == targets


def exact_match(ok: Bool[Array, "*b t"], mask: Bool[Array, "*b t"]) -> Bool[Array, "*b"]:
    """Returns whether every scored token is right; a sequence with nothing scored counts as right.

    Teacher-forced exact match of a whole block equals greedy decoding emitting exactly that block.
    """
    return jnp.all(ok | ~mask, axis=-1)


def token_accuracy(ok: Bool[Array, "*b t"], mask: Bool[Array, "*b t"]) -> Float[Array, "*b"]:
    """Share of scored tokens that are right, in [0, 1]; 0 where nothing is scored."""
    return jnp.sum(ok & mask, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)
