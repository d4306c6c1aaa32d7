"""Perturbed prompts: what is added to the embeddings of a prompt's tokens is optimised towards compliance.

An attacker who knows that a defence moves representations has it keep them where they were, too: it is adaptive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety import losses
from jaxsafety.config.fields import check, static, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between, whole_number
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.linalg import descent
from jaxsafety.types import RESIDUAL, Attack, Attacked, Batch, Key, Leaf, Point, Section, Target

Scalar = float | Float[Array, ""]
# Embeddings to logits and to the hidden states that are to match a reference.
Forward = Callable[[Float[Array, "b t d"]], tuple[Float[Array, "b t v"], Float[Array, "b t f"]]]


@flax.struct.dataclass
class Found:
    """What an attack found, and how it got there.

    Attributes:
        added: ``[b, t, d]``, zero outside of the prompts.
        loss: ``[steps, b]`` what is minimised, before every step.
    """

    added: Leaf
    loss: Leaf


@checked
def distance(
    hidden: Float[Array, "b t f"], reference: Float[Array, "b t f"], *, mask: Bool[Array, "b t"]
) -> Float[Array, " b"]:
    """Returns ``|h - r|^2 / |r|^2``, each summed over the marked places of a row; 0 where none is marked.

    What stands elsewhere, a NaN too, changes neither the value nor its gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> h, mask = jnp.float32([[[3.0, 0.0], [9.0, 9.0]]]), jnp.array([[True, False]])
        >>> print(distance(h, jnp.float32([[[2.0, 0.0], [0.0, 0.0]]]), mask=mask))
        [0.25]
    """
    h, r = (jnp.where(mask[..., None], one, 0.0) for one in (hidden, reference))
    total = jnp.sum(r**2, axis=(1, 2))
    return jnp.sum((h - r) ** 2, axis=(1, 2)) / jnp.where(total > 0, total, 1.0)


@checked
def perturb(
    forward: Forward,
    embeddings: Float[Array, "b t d"],
    *,
    targets: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    prompt: Bool[Array, "b t"],
    radius: Scalar,
    steps: int,
    match: Scalar = 0.0,
    reference: Float[Array, "b t f"] | None = None,
) -> Found:
    """Projected gradient descent on what is added to each token of a prompt, from nothing, in an l2 ball per token.

    It minimises each prompt's mean NLL of the scored targets plus ``match`` times the :func:`distance` of hidden
    states from the ``reference`` at the places that predict them. Steps are those of
    :func:`jaxsafety.linalg.descent.descended`, all of which are made.

    Args:
        forward: embeddings to logits and hidden states, parameters bound.
        embeddings: prompts followed by the complied answer.
        targets, mask: the token after each input, and which of them to make likely.
        prompt: the places that may be changed.
        radius: largest norm of what is added to a token, >= 0.
        steps: at least 1.
        match: weight of the distance, >= 0.
        reference: hidden states that are to be matched; None is none, whatever the weight.

    Raises:
        ValueError: a radius, weight or number of steps out of range, or a gradient: it has none.

    References:
        Madry et al. 2018 (arXiv 1706.06083), projected gradient descent; Schwinn et al. 2024 (arXiv 2402.09063),
        attacks on embeddings.
    """
    check_between("radius", radius, 0)
    check_between("match", match, 0)
    steps = whole_number("steps", steps, 1)
    found = _perturbed(forward, embeddings, targets, mask, prompt, radius, match, reference, steps=steps)
    return undifferentiated("perturb", found)


@compiled("steps")
def _perturbed(forward, embeddings, targets, mask, prompt, radius, match, reference, *, steps):
    def loss(added: Float[Array, "b t d"]) -> tuple[Float[Array, ""], Float[Array, " b"]]:
        logits, hidden = forward(embeddings + jnp.where(prompt[..., None], added, 0.0))
        told = -losses.sequence_logprobs(losses.token_logprobs(logits, targets), mask, reduction="mean")
        if reference is not None:
            told = told + match * distance(hidden, reference, mask=mask)
        return jnp.sum(told), told

    start, given = jnp.zeros_like(embeddings), {"radius": radius, "steps": steps, "taken": steps}
    return Found(*descent.descended(loss, start, active=prompt[..., None], **given))


@dataclass(frozen=True)
class Config:
    """How far embeddings are moved, and what else the attacker knows.

    Attributes:
        steps: gradient steps, whose length belongs to their number.
        match: weight of the distance of hidden states on the complied answer from those of the model that the attacked
            one was tuned from, on the prompt as it is; 0 is not adaptive.
        layer: the layer, from 0, whose output is matched: that of the defence.
        radius: of what is added to each token, in units of the mean norm of the tokens' embeddings.

    Fidelity: embeddings of the prompt are moved, as in arXiv 2402.09063, in an l2 ball a token; the adaptive term is
        ours.
    """

    steps: int = static(20, at_least=1)
    match: float = static(0.0, at_least=0)
    layer: int = static(1, at_least=0)
    radius: tuple[float, ...] = swept(0.0, 0.1, 0.2, 0.5, 1.0, at_least=0)
    __post_init__ = check


def attack(target: Target, config: Config, *, point: Point, key: Key) -> Attacked:
    """See :class:`jaxsafety.types.Attack`.

    ``norm`` is the mean norm of what is added to a prompt token, in units of the mean norm of an embedding.
    """
    model, trial, side = target.model, target.trial, target.trial.complied
    embeddings = model.embed(target.params, side.tokens)
    prompt = jnp.arange(side.tokens.shape[1])[None] <= trial.last[:, None]
    scale = jnp.mean(jnp.linalg.norm(embeddings, axis=-1))

    asked = {"sites": (RESIDUAL,), "layers": (config.layer,)} if config.match else {}

    def forward(params: Leaf, inputs: Leaf) -> tuple[Array, Array | None]:
        found = model.apply(params, inputs, **asked)
        return found.logits, found.activations[RESIDUAL][0] if config.match else None

    found = perturb(
        lambda inputs: forward(target.params, inputs), embeddings, targets=side.targets, mask=side.mask, prompt=prompt,
        radius=point["radius"] * scale, steps=config.steps, match=config.match,
        reference=forward(target.base, side.tokens)[1],
    )  # fmt: skip

    def into(one: Batch) -> Batch:
        return one.replace(tokens=model.embed(target.params, one.tokens) + found.added)

    norms = jnp.sum(jnp.linalg.norm(found.added, axis=-1), axis=1) / jnp.sum(prompt, axis=1) / scale
    changed = trial.replace(complied=into(trial.complied), refused=into(trial.refused))
    return Attacked(trial=changed, metrics={"norm": norms, "loss_start": found.loss[0], "loss_end": found.loss[-1]})


SECTION = Section(
    "Perturbed embeddings of the prompt",
    "beyond the paper",
    "To the right every token of the prompt may be moved further: a defence that gives way to a short step has moved "
    "the border of refusing, and not what lies behind it.",
)
ATTACK = Attack(Config, attack, inside=True, section=SECTION)
