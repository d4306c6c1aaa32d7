"""Array maths of the objectives: logits, targets and masks in, numbers out. No model, no world.

Reductions return ``(sum, count)``; the quotient is taken once, over the global batch, so that microbatches and
devices never change a result. Everything is float32, whatever the logits' dtype.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Reduction = Literal["sum", "mean"]
SumCount = tuple[Float[Array, ""], Float[Array, ""]]


def token_logprobs(logits: Float[Array, "*b t v"], targets: Int[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Log-probability of every target token, ``log softmax(logits)[target]``, in nats.

    Args:
        logits: ``[..., t, v]`` unnormalised scores.
        targets: ``[..., t]`` token ids in ``[0, v)``.

    Returns:
        ``[..., t]`` float32, at most 0.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def masked_sum(values: Float[Array, "*b"], mask: Bool[Array, "*b"]) -> SumCount:
    """Returns the sum of ``values`` where ``mask`` holds, and how many there are."""
    return jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask, dtype=jnp.float32)


def quotient(total: Float[Array, "*b"], count: Float[Array, ""]) -> Float[Array, "*b"]:
    """Returns ``total / count``, and 0 where nothing was counted."""
    return total / jnp.maximum(count, 1.0)


def nll(logprobs: Float[Array, "*b t"], mask: Bool[Array, "*b t"]) -> SumCount:
    """Negative log-likelihood in nats summed over the scored tokens, and their number."""
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


def dpo(
    margin_chosen: Float[Array, " b"],
    margin_rejected: Float[Array, " b"],
    *,
    weight_chosen: float | Float[Array, ""],
    weight_rejected: float | Float[Array, ""],
) -> SumCount:
    """Direct preference optimisation, ``-log sigmoid(w_c * margin_chosen - w_r * margin_rejected)`` per pair, in nats.

    Args:
        margin_chosen: ``[b]`` log-prob of the preferred answer under the policy minus under the reference.
        margin_rejected: ``[b]`` the same for the dispreferred answer.
        weight_chosen: DPO's beta on the preferred side.
        weight_rejected: DPO's beta on the dispreferred side; equal weights are the textbook loss.

    Returns:
        Sum over the batch (``log 2`` per pair at policy == reference) and the number of pairs.

    References:
        Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; two weights as in Jain et al. 2024 (arXiv 2407.10264).
    """
    logits = weight_chosen * margin_chosen - weight_rejected * margin_rejected
    return jnp.sum(-jax.nn.log_sigmoid(logits)), jnp.float32(margin_chosen.shape[0])


def dpo_slope(margins: Float[Array, " b"]) -> Float[Array, " b"]:
    """Weight that DPO gives the gradient of each pair, ``sigmoid(-margin)`` in (0, 1).

    It is 1/2 at policy == reference. As long as it stays there, DPO's gradient is parallel to that of unlearning with
    the same ratio of weights; near 0 the pair is satisfied and pushes no more.

    Args:
        margins: ``[b]`` weighted margin of each pair, the argument of the log-sigmoid in :func:`dpo`.

    References:
        Rafailov et al. 2023 (arXiv 2305.18290), section 4: the weight in the gradient of eq. 7.
    """
    return jax.nn.sigmoid(-margins)


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
