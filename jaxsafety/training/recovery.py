"""Answers that turn from the dispreferred to the preferred one: what methods that deepen a refusal learn from.

Both are answers to the same prompts, whose first scored target stands in one place.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_alike, check_between
from jaxsafety.types import Batch


@checked
def recovery(chosen: Batch, rejected: Batch, *, depth: Int[Array, " b"], aligned: bool) -> Batch:
    """Returns the preferred answers behind the first ``depth`` tokens of the dispreferred ones, which are not scored.

    The preferred answer begins there, and its end is cut off where there is no room for it. Of ``aligned`` answers, see
    :class:`jaxsafety.types.PreferenceBatch`, it goes on with the token whose place it is, which is how
    :func:`jaxsafety.attacks.prefill.prefilled` is judged. A depth of 0 is ``chosen``, bit for bit.

    References:
        Qi et al. 2024 (arXiv 2406.05946), section 3: safety recovery examples; Yuan et al. 2024 (arXiv 2407.09121):
        harmful response prefixes. Fidelity: neither has aligned answers.

    Raises:
        ValueError: a depth below 0, or batches of different shapes.
    """
    check_alike(chosen=chosen, rejected=rejected)
    check_between("depth", depth, 0)
    place, deep = jnp.arange(chosen.mask.shape[1])[None, :], depth[:, None]
    index = place - jnp.argmax(chosen.mask, axis=1)[:, None]

    def spliced(own: Array, given: Array, index: Int[Array, "b t"]) -> Array:
        after = own if aligned else jnp.take_along_axis(own, place - jnp.where(index >= deep, deep, 0), axis=1)
        return jnp.where((index >= 0) & (index < deep), given, after)

    # Target i is token i + 1.
    return chosen.replace(
        tokens=spliced(chosen.tokens, rejected.tokens, index - 1),
        targets=spliced(chosen.targets, rejected.targets, index),
        mask=spliced(chosen.mask, jnp.zeros_like(chosen.mask), index),
    )


@checked
def avertable(batch: Batch) -> Bool[Array, "b t"]:
    """Returns the scored targets in whose place another answer may go on: all but the last, which ends the answer."""
    return batch.mask & (jnp.cumsum(batch.mask, axis=1) < jnp.sum(batch.mask, axis=1, keepdims=True))
