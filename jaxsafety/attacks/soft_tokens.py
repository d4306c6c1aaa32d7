"""Soft-token attack: embeddings that belong to no token, inserted into the prompt and optimised towards compliance.

The window has a fixed length: what is inserted at index ``at`` in [0, t) (the last prompt token's) pushes the rest to
the right, and what leaves the window is dropped. A target follows the input that predicts it, so the first answer token
is predicted at ``at + count``. ``count`` soft tokens are inserted; it may be traced: one compiled program serves every
strength. ``mask`` marks the scored targets without the attack. Arrays of other shapes or types are a ValueError, and so
is an ``at`` outside of the window, where it must lie when it is traced. Only what :func:`insert` gives has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsafety import losses
from jaxsafety.config.fields import check, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between, check_indices, whole_number
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.linalg import descent
from jaxsafety.types import Attack, Attacked, Batch, ForwardEmbeddings, Key, Leaf, Point, Section, Target, Trial

# Standard deviation of the starting point, far inside the ball: the paper's released value.
_INIT_STD = 0.01

Count = int | Int[Array, ""]


@flax.struct.dataclass
class Found:
    """What an attack found, and how it got there.

    Attributes:
        soft: ``[b, n, d]`` soft tokens.
        loss: ``[steps]`` NLL of the attacked answer in nats per token after 0, 1, ... ``steps - 1`` steps: the mean
            over the prompts that keep a scored target, NaN if none does, or if the step was not made.
    """

    soft: Leaf
    loss: Leaf


@checked
def insert(
    array: Shaped[Array, "b t *d"], inserted: Shaped[Array, "b n *d"], *, at: Int[Array, " b"], count: Count
) -> Shaped[Array, "b t *d"]:
    """Inserts the first ``count`` entries, in the array's dtype, before index ``at`` of each row, which is cut at t.

    Entries from ``count`` on have no effect and no gradient. A traced count above n gives NaN.

    Raises:
        ValueError: a count outside [0, n].
    """
    _check(array, at, count, inserted.shape[1])
    inside, moved = _moved(array, at=at, count=count)
    index = jnp.arange(array.shape[1])[None, :] - at[:, None]
    # Places outside the insertion read an arbitrary entry (or the NaN beyond the last), which nothing uses.
    entries = jnp.take_along_axis(inserted.astype(array.dtype), _trailing(index, array.ndim), axis=1)
    return jnp.where(_trailing(inside, array.ndim), entries, moved)


@checked
def shifted(
    array: Shaped[Array, "b t"], *, at: Int[Array, " b"], count: Count, fill: bool | int | float
) -> Shaped[Array, "b t"]:
    """Moves what stands at ``at`` or later ``count`` places to the right, with ``fill`` in the gap.

    Turns tokens into those of the attacked window (``fill`` stands for the soft tokens) and targets into the matching
    targets, except that the input before ``at`` keeps the target it had; :func:`shifted_mask` never scores it.

    Raises:
        ValueError: a count below 0.
    """
    _check(array, at, count)
    inside, moved = _moved(array, at=at, count=count)
    return jnp.where(inside, jnp.asarray(fill, array.dtype), moved)


@checked
def shifted_mask(mask: Bool[Array, "b t"], *, at: Int[Array, " b"], count: Count) -> Bool[Array, "b t"]:
    """Moves the marks of scored targets along with their targets.

    Soft tokens predict nothing that is scored, nor does the input before the first of them, whose next token is soft.

    Those pushed out of the window are gone (see :func:`fits`).

    Raises:
        ValueError: a count below 0.
    """
    before = jnp.arange(mask.shape[1])[None, :] == at[:, None] - 1
    return shifted(mask, at=at, count=count, fill=False) & ~(before & (jnp.asarray(count) > 0))


@checked
def fits(mask: Bool[Array, "b t"], *, at: Int[Array, " b"], count: Count) -> Bool[Array, " b"]:
    """Returns which prompts keep every scored target in the attacked window.

    A verdict on a prompt that does not fit would be about a part of its answer: leave it out.

    Raises:
        ValueError: a count below 0.
    """
    return jnp.sum(shifted_mask(mask, at=at, count=count), axis=1) == jnp.sum(mask, axis=1)


@checked
def optimise(
    forward: ForwardEmbeddings,
    embeddings: Float[Array, "b t d"],
    *,
    targets: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    at: Int[Array, " b"],
    count: Count,
    max_count: int,
    radius: float | Float[Array, ""],
    steps: int,
    taken: Count,
    key: Key,
) -> Found:
    """Projected gradient descent on soft tokens, for the likelihood of the answer that the model should refuse.

    Every step follows the gradient of each prompt's mean NLL of the scored targets: it is scaled to unit l2 norm for
    each soft token, the step is ``2 * radius / steps`` long, and each token is projected onto the l2 ball of
    ``radius``. The strength of an attack is tokens times steps. Prompts do not influence each other. The starting
    point does not depend on ``count``: attacks with more tokens start from those of the weaker ones.

    Args:
        forward: embeddings to logits, parameters bound. Called eagerly, a :class:`jax.tree_util.Partial` of them is
            compiled once, any other function in every call: what it closes over may change.
        embeddings: prompts followed by the complied answer.
        targets, mask: the token after each input, and which of them to make likely, without the attack.
        at: see above; the soft tokens go before it.
        count: in [0, max_count]; may be traced.
        max_count: n, places for soft tokens; those from ``count`` on keep their starting point.
        radius: largest norm of a soft token, >= 0; the paper takes the mean norm of the token embeddings.
        steps: gradient steps of the whole attack, >= 1, which its step length belongs to.
        taken: how many of them are made, in [0, steps]; may be traced.
        key: typed PRNG key of the starting point.

    Raises:
        ValueError: max_count, steps or radius out of range, count outside [0, max_count], taken outside [0, steps], or
            a gradient is asked; it has none: put ``jax.lax.stop_gradient`` around what it is given.

    References:
        Jain et al. 2024 (arXiv 2407.10264), section 5 and Figure 7, "Adv".

    Fidelity: the attack as described, not as released: the released code leaves the last soft token's gradient
        unscaled (off by one), limits each coordinate instead of each token's norm, scores the whole sequence, and
        reads the answer at the unshifted positions.
    """
    sizes = {"max_count": whole_number("max_count", max_count, 1), "steps": whole_number("steps", steps, 1)}
    _check(targets, at, count, max_count)
    check_between("taken", taken, 0, steps, what=", the steps of the attack")
    check_between("radius", radius, 0)
    # Of the parameters that the model closes over, too: through every step, and the projection's edge.
    found = _optimised(forward, embeddings, targets, mask, at, count, radius, taken, key, **sizes)
    return undifferentiated("optimise", found)


@compiled("max_count", "steps")
def _optimised(forward, embeddings, targets, mask, at, count, radius, taken, key, *, max_count, steps):
    targets = shifted(targets, at=at, count=count, fill=0)
    mask = shifted_mask(mask, at=at, count=count)
    active = (jnp.arange(max_count) < count)[None, :, None]

    def loss(soft: Float[Array, "b n d"]) -> tuple[Float[Array, ""], Float[Array, " b"]]:
        logits = forward(insert(embeddings, soft, at=at, count=count))
        logprobs = losses.token_logprobs(logits, targets)
        nll = -losses.sequence_logprobs(logprobs, mask, reduction="mean")
        # No prompt's tokens reach another's answer, so the gradient of the sum is each prompt's own.
        return jnp.sum(nll), nll

    start = _INIT_STD * jax.random.normal(key, (embeddings.shape[0], max_count, embeddings.shape[2]), jnp.float32)
    start = descent.projected(start, radius=radius)
    soft, told = descent.descended(loss, start, active=active, radius=radius, steps=steps, taken=taken)
    scored = mask.any(axis=1)
    return Found(soft=soft, loss=jnp.sum(jnp.where(scored[None], told, 0.0), axis=1) / jnp.sum(scored))


@dataclass(frozen=True)
class Config:
    """How strong the attack is.

    Attributes:
        count: numbers of soft tokens; 0 is the prompt as it is.
        steps: attack steps that are made; the last one is the whole attack's, which their length belongs to.
    """

    count: tuple[int, ...] = swept(0, 1, 2, 4, at_least=0)
    steps: tuple[int, ...] = swept(0, 5, 10, 20, at_least=0)

    def __post_init__(self):
        check(self)
        if self.steps[-1] < 1:
            raise ValueError(f"steps must end with at least 1 step, got {list(self.steps)}")


def points(config: Config) -> Sequence[Point]:
    """Every number of steps for every number of tokens; without a token there is one point."""
    some = [{"count": count, "steps": steps} for count in config.count if count for steps in config.steps]
    return [{"count": 0, "steps": 0}] * (0 in config.count) + some


def attack(target: Target, config: Config, *, point: Point, key: Key) -> Attacked:
    """See :class:`jaxsafety.types.Attack`, and :func:`widened`; ``norm`` is the mean norm of the soft tokens."""
    model, trial, count = target.model, target.trial, point["count"]
    embeddings = model.embed(target.params, trial.complied.tokens)
    found = optimise(
        lambda inputs: model.apply(target.params, inputs).logits, embeddings, targets=trial.complied.targets,
        mask=trial.complied.mask, at=trial.last, count=count, max_count=max(1, *config.count),
        radius=jnp.mean(jnp.linalg.norm(embeddings, axis=-1)), steps=config.steps[-1], taken=point["steps"], key=key,
    )  # fmt: skip

    def into(tokens: Array) -> Array:
        return insert(model.embed(target.params, tokens), found.soft, at=trial.last, count=count)

    used = jnp.arange(found.soft.shape[1])[None, :] < count
    norms = jnp.where(used, jnp.linalg.norm(found.soft, axis=-1), 0.0)
    return Attacked(trial=widened(target, into, count=count), metrics={"norm": jnp.sum(norms, axis=1) / count})


def widened(target: Target, into: Callable[[Leaf], Leaf], *, count: Count) -> Trial:
    """Returns the prompts of a target with ``count`` inputs before their last token: ``into`` puts them into tokens.

    Prompts whose answer no longer fits the window are not judged. The letters of the answer are, not the stop token
    behind them: inserted tokens make the text look longer, and a model that counts positions stops as many letters
    late, whatever it answers.
    """
    trial = target.trial
    fitting = fits(_letters(target, trial.complied), at=trial.last, count=count)
    moved = partial(shifted, at=trial.last, count=count)

    def side(one: Batch) -> Batch:
        mask = shifted_mask(_letters(target, one), at=trial.last, count=count) & fitting[:, None]
        return Batch(tokens=into(one.tokens), targets=moved(one.targets, fill=0), mask=mask)

    blocks = jnp.stack([moved(trial.blocks[:, block], fill=False) for block in range(2)], axis=1)
    return trial.replace(
        complied=side(trial.complied), refused=side(trial.refused), blocks=blocks, last=trial.last + count
    )


def _letters(target: Target, side: Batch) -> Bool[Array, "b t"]:
    return side.mask & (side.targets != target.stop)


SECTION = Section(
    "Soft tokens of growing strength",
    "Figure 7, right",
    "To the right the attack takes more steps, a curve for every number of soft tokens: if compliance rises together "
    "with τ while the gain of the update falls, the attack works by making an unsafe prompt look safe.",
    claims=("stronger_attacks",),
)
ATTACK = Attack(Config, attack, points=points, inside=True, section=SECTION)


def _moved(array: Array, *, at: Array, count: Count) -> tuple[Bool[Array, "b t"], Array]:
    """Returns which places the insertion takes, and the array with what stands after them moved there."""
    index = jnp.arange(array.shape[1])[None, :]
    after = index - at[:, None]
    source = jnp.where(after < 0, index, index - count)
    return (after >= 0) & (after < count), jnp.take_along_axis(array, _trailing(source, array.ndim), axis=1)


def _trailing(index: Array, ndim: int) -> Array:
    return index.reshape(index.shape + (1,) * (ndim - 2))


def _check(array: Array, at: Array, count: Count, largest: int | None = None) -> None:
    check_indices("at", at, array.shape[1], of="a place of the window")
    check_between("count", count, 0, largest, what=", the soft tokens there are")
