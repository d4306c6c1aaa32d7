"""Tamper-resistant safeguards (TAR): to refuse also once somebody has fine-tuned the model on harmful answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsafety import losses
from jaxsafety.config.fields import check, static, traced
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import whole_number
from jaxsafety.entry.programs import compiled
from jaxsafety.training import answers
from jaxsafety.training.branching import branched, filled
from jaxsafety.types import Key, Method, Model, Needs, Params, PreferenceBatch, SumCount, Terms

Scalar = float | Float[Array, ""]


@checked
def attacked(
    loss: Callable[[Params], Scalar], params: Params, *, rate: Scalar, steps: int
) -> tuple[Params, Float[Array, " {steps}"]]:
    """Returns parameters after so many steps of gradient descent on a loss, and the loss before each of them.

    The gradient of what is found is that of the parameters themselves, as if the steps had not depended on them.

    Raises:
        ValueError: fewer than one step.

    References:
        Tamirisa et al. 2024 (arXiv 2408.00761), first-order; Finn et al. 2017 (arXiv 1703.03400), section 5.2.

    Example:
        >>> import jax.numpy as jnp
        >>> moved, losses = attacked(lambda w: jnp.sum(w**2), jnp.float32([1.0, -2.0]), rate=0.25, steps=2)
        >>> print(moved, losses)
        [ 0.25 -0.5 ] [5.   1.25]
    """
    whole_number("steps", steps, 1)
    return _attacked(loss, params, rate, steps=steps)


@compiled("steps")
def _attacked(loss, params, rate, *, steps):
    def step(current: Params, _: None) -> tuple[Params, Float[Array, ""]]:
        value, slope = jax.value_and_grad(loss)(current)
        return jax.tree.map(lambda leaf, own: leaf - (rate * own).astype(leaf.dtype), current, slope), value

    start = jax.lax.stop_gradient(params)
    end, values = jax.lax.scan(step, start, length=steps)
    moved = jax.tree.map(lambda after, before: jax.lax.stop_gradient(after - before), end, start)
    return jax.tree.map(jnp.add, params, moved), jax.lax.stop_gradient(values)


@checked
def halves(unsafe: Bool[Array, " b"]) -> tuple[Bool[Array, " b"], Bool[Array, " b"]]:
    """Returns every other of the unsafe examples, the first among them, and the others."""
    is_odd = jnp.cumsum(unsafe) % 2 == 1
    return unsafe & is_odd, unsafe & ~is_odd


@dataclass(frozen=True)
class Config:
    """Mean over scored tokens of preferred answers, and of what is resisted by a model that was attacked, in nats.

    The attack is gradient descent on the harmful answers of every other unsafe prompt of the batch; what it leaves is
    looked at on the others.

    Attributes:
        resist: with ``refusal`` the attacked model is to refuse, with ``entropy`` to be as uncertain as can be of every
            token of the harmful answers.
        weight: of what is resisted.
        inner_steps: of the attack.
        inner_rate: learning rate of the attack, on the mean per scored token.

    References:
        Tamirisa et al. 2024 (arXiv 2408.00761).

    Fidelity: first order, as theirs. The attack is plain gradient descent on one batch, and the attacked model is
        looked at once, after the last step; theirs is Adam over many, of several kinds, and the gradients along the way
        are added. Their loss of refusing is DPO's, here it is that of the refusal's likelihood; their representations
        are held where they were, here preferred answers are learned. Over an adapter its factors are attacked, as they
        are trained. A batch needs two unsafe prompts for the second term.
    """

    resist: Literal["refusal", "entropy"] = "refusal"
    weight: float = traced(1.0, at_least=0)
    inner_steps: int = static(4, at_least=1)
    inner_rate: float = traced(0.1, at_least=0)
    __post_init__ = check


def totals(
    model: Model, params: Params, batch: PreferenceBatch, config: Config, aux: Any, *, key: Key, progress: Array
) -> tuple[Terms, Terms]:
    """See :class:`jaxsafety.types.Method`."""
    taught, held = halves(batch.unsafe)

    def loss(params: Params) -> Float[Array, ""]:
        found, _ = answers.side_logprobs(model, params, batch.rejected)
        return losses.quotient(*losses.nll(found, batch.rejected.mask & taught[:, None]))

    worst, curve = attacked(loss, params, rate=config.inner_rate, steps=config.inner_steps)
    harmful, resisted = (_refusal if config.resist == "refusal" else _certainty)(model, worst, batch, held)
    after = losses.quotient(*losses.nll(harmful, batch.rejected.mask & taught[:, None]))
    kept, metrics = answers.next_token(model, params, batch.chosen)
    metrics |= {"harmful_nll/before": losses.summed(curve[:1]), "harmful_nll/after": losses.summed(after[None])}
    return {"kept": kept["nll"], "resisted": (config.weight * resisted[0], resisted[1])}, metrics


def _refusal(
    model: Model, params: Params, batch: PreferenceBatch, held: Bool[Array, " b"]
) -> tuple[Float[Array, "b t"], SumCount]:
    """The log-probability of every target of the harmful answers, and what is resisted by refusing."""
    (found, harmful), _ = answers.logprobs(model, params, batch)
    return harmful, losses.nll(found, batch.chosen.mask & held[:, None])


def _certainty(
    model: Model, params: Params, batch: PreferenceBatch, held: Bool[Array, " b"]
) -> tuple[Float[Array, "b t"], SumCount]:
    """The same, and what is resisted by being uncertain."""
    stem, (logits,) = branched(model, params, batch.rejected)
    found = losses.token_logprobs(logits, batch.rejected.targets[:, stem:]), -losses.entropy(logits)
    harmful, certainty = (filled(values, stem=stem, value=jnp.nan) for values in found)
    return harmful, losses.masked_sum(certainty, batch.rejected.mask & held[:, None])


METHOD = Method(Config, totals, needs=lambda config: Needs(divisible=False, unsafe=True))
