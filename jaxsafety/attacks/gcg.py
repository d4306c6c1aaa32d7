"""Greedy coordinate gradient (GCG): tokens inserted into a prompt, exchanged one at a time towards compliance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety import losses
from jaxsafety.attacks.soft_tokens import Count, insert, shifted, shifted_mask, widened
from jaxsafety.config.fields import check, static, swept
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between, check_indices, whole_number
from jaxsafety.entry.programs import compiled, undifferentiated
from jaxsafety.types import Attack, Attacked, ForwardEmbeddings, Key, Leaf, Point, Section, Target, Trial


@flax.struct.dataclass
class Found:
    """What an attack found, and how it got there.

    Attributes:
        tokens: ``[b, n]`` what is inserted.
        loss: ``[steps + 1, b]`` mean NLL of the attacked answer of every prompt, in nats per token, after each step.
    """

    tokens: Leaf
    loss: Leaf


@checked
def search(
    forward: ForwardEmbeddings,
    tokens: Int[Array, "b t"],
    *,
    table: Float[Array, "v d"],
    allowed: Bool[Array, " v"],
    targets: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    at: Int[Array, " b"],
    count: Count,
    max_count: int,
    steps: int,
    top_k: int,
    candidates: int,
    key: Key,
) -> Found:
    """Greedy coordinate gradient on tokens inserted before ``at``, for the likelihood of the answer that is scored.

    In every step the gradient of the loss with respect to a token's one-hot vector says for each place which ``top_k``
    of the allowed tokens promise most; ``candidates`` exchanges are drawn, a place and one of its tokens each, their
    losses are computed, and the best takes the place of what there is if it is better. Prompts do not influence each
    other; places from ``count`` on keep their starting point, which does not depend on it.

    Args:
        forward: embeddings to logits, parameters bound.
        tokens: prompts followed by the complied answer.
        table: the embeddings of all tokens.
        allowed: which of them may be inserted, at least one.
        targets, mask: the token after each input, and which of them to make likely, without the attack.
        at: see :mod:`jaxsafety.attacks.soft_tokens`, as for ``count`` and ``max_count``.
        count: inserted tokens, in [0, max_count]; may be traced.
        max_count: places for them.
        steps: at least 0.
        top_k: in [1, v].
        candidates: at least 1, drawn for each prompt and step.
        key: typed PRNG key of the starting point and of all draws.

    Raises:
        ValueError: a number out of range, or a gradient: it has none.

    References:
        Zou et al. 2023 (arXiv 2307.15043), algorithm 1.

    Fidelity: the paper takes the best candidate even where it is worse than what there is; here the loss never rises.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> given = {"targets": jnp.array([[1, 2, 0]]), "mask": jnp.array([[False, True, False]])}
        >>> sizes = {"count": 1, "max_count": 1, "steps": 3, "top_k": 3, "candidates": 8}
        >>> places = {"table": jnp.eye(3), "allowed": jnp.ones(3, bool), "at": jnp.array([0])}
        >>> given |= {"key": jax.random.key(0)} | sizes | places
        >>> found = search(lambda e: jnp.cumsum(e, axis=1), jnp.array([[0, 1, 1]]), **given)
        >>> print(found.tokens, found.loss[:, 0].round(1))
        [[2]] [2.4 1.1 1.1 1.1]
    """
    sizes = {"max_count": whole_number("max_count", max_count, 1), "steps": whole_number("steps", steps, 0),
             "top_k": whole_number("top_k", top_k, 1, len(table), what=", the tokens there are"),
             "candidates": whole_number("candidates", candidates, 1)}  # fmt: skip
    check_indices("at", at, tokens.shape[1], of="a place of the window")
    check_between("count", count, 0, max_count, what=", the places for tokens")
    return undifferentiated(
        "search", _searched(forward, tokens, table, allowed, targets, mask, at, count, key, **sizes)
    )


@compiled("max_count", "steps", "top_k", "candidates")
def _searched(
    forward, tokens, table, allowed, targets, mask, at, count, key, *, max_count, steps, top_k, candidates
):  # fmt: skip
    targets, mask = shifted(targets, at=at, count=count, fill=0), shifted_mask(mask, at=at, count=count)
    embeddings, rows = table[tokens], jnp.arange(len(tokens))

    def nll(soft: Float[Array, "b n d"]) -> Float[Array, " b"]:
        logprobs = losses.token_logprobs(forward(insert(embeddings, soft, at=at, count=count)), targets)
        return -losses.sequence_logprobs(logprobs, mask, reduction="mean")

    def exchanged(chosen: Int[Array, "b n"], key: Key) -> Int[Array, "m b n"]:
        slope = jax.grad(lambda soft: jnp.sum(nll(soft)))(table[chosen])
        promise = jnp.where(allowed[None, None], -jnp.einsum("bnd,vd->bnv", slope, table), -jnp.inf)
        best = jax.lax.top_k(promise, top_k)[1]
        draws = (candidates, len(tokens))
        place = jax.random.randint(jax.random.fold_in(key, 0), draws, 0, jnp.maximum(count, 1))
        rank = jax.random.randint(jax.random.fold_in(key, 1), draws, 0, jnp.minimum(top_k, jnp.sum(allowed)))
        new = best[rows[None], place, rank]
        return jnp.where(jnp.arange(max_count)[None, None] == place[..., None], new[..., None], chosen[None])

    def step(carry: tuple[Array, Array], key: Key) -> tuple[tuple[Array, Array], Array]:
        chosen, loss = carry
        tried = exchanged(chosen, key)
        found = jax.lax.map(lambda one: nll(table[one]), tried)
        found = jnp.where(jnp.isnan(found), jnp.inf, found)
        winner = jnp.argmin(found, axis=0)
        lower = found[winner, rows] < loss
        kept = jnp.where(lower[:, None], tried[winner, rows], chosen), jnp.where(lower, found[winner, rows], loss)
        return kept, kept[1]

    def searched(start: Int[Array, "b n"]) -> tuple[Array, Array]:
        first = nll(table[start])
        (chosen, _), curve = jax.lax.scan(step, (start, first), jax.random.split(jax.random.fold_in(key, 1), steps))
        return chosen, jnp.concatenate([first[None], curve])

    weights = jnp.where(allowed, 0.0, -jnp.inf)
    start = jax.random.categorical(jax.random.fold_in(key, 0), weights, shape=(len(tokens), max_count))
    start = start.astype(tokens.dtype)

    def unmoved(start: Int[Array, "b n"]) -> tuple[Array, Array]:
        return start, jnp.broadcast_to(nll(table[start])[None], (steps + 1, len(tokens)))

    return Found(*jax.lax.cond(count > 0, searched, unmoved, start))


@checked
def words(trial: Trial, *, size: int) -> Bool[Array, " {size}"]:
    """Marks the tokens that stand in prompts ``[*x]``, apart from those that stand at one place of all of them.

    The latter are the form of a prompt, such as where it begins; ``size`` is that of the vocabulary.
    """
    tokens = trial.complied.tokens.reshape(-1, trial.complied.tokens.shape[-1])
    inside = jnp.arange(tokens.shape[1])[None] < trial.last.reshape(-1)[:, None]
    form = jnp.all((tokens == tokens[:1]) & inside, axis=0)
    none = jnp.zeros(size, bool)
    used = none.at[jnp.where(inside, tokens, size)].set(True, mode="drop")
    return used & ~none.at[jnp.where(form, tokens[0], size)].set(True, mode="drop")


@dataclass(frozen=True)
class Config:
    """How strong the attack is.

    Attributes:
        steps: exchanges of one token that are looked for.
        top_k: tokens that a place may be given, those that promise most.
        candidates: exchanges that are tried in every step, for each prompt.
        tokens: ``all`` that there are may be inserted, or those alone that are ``words`` of held-out prompts, see
            :func:`words`.
        count: numbers of inserted tokens; 0 is the prompt as it is.

    References: Zou et al. 2023 (arXiv 2307.15043).
    Fidelity: a suffix for every prompt, before the token that ends it; the paper's sizes are 20 tokens, 500 steps, 256
        and 512. See :func:`search`.
    """

    steps: int = static(20, at_least=1)
    top_k: int = static(8, at_least=1)
    candidates: int = static(32, at_least=1)
    tokens: Literal["all", "words"] = "all"
    count: tuple[int, ...] = swept(0, 1, 2, 4, at_least=0)
    __post_init__ = check


def attack(target: Target, config: Config, *, point: Point, key: Key) -> Attacked:
    """See :class:`jaxsafety.types.Attack`, and :func:`jaxsafety.attacks.soft_tokens.widened` for what is judged.

    ``loss_0`` and so on are the mean NLL of the complied answer after quarters of the steps, in nats per token.
    """
    model, params, trial, count = target.model, target.params, target.trial, point["count"]
    tokens = trial.complied.tokens
    size = jax.eval_shape(model.apply, params, tokens).logits.shape[-1]
    table = model.embed(params, jnp.arange(size, dtype=tokens.dtype)[:, None])[:, 0]
    allowed = words(target.held_out, size=size) if config.tokens == "words" else jnp.ones(size, bool)
    found = search(
        lambda inputs: model.apply(params, inputs).logits, tokens, table=table,
        allowed=allowed, targets=trial.complied.targets, mask=trial.complied.mask,
        at=trial.last, count=count, max_count=max(1, *config.count), steps=config.steps,
        top_k=min(config.top_k, size), candidates=config.candidates, key=key,
    )  # fmt: skip
    changed = widened(target, lambda side: insert(side, found.tokens, at=trial.last, count=count), count=count)
    shown = sorted({config.steps * quarter // 4 for quarter in range(5)})
    return Attacked(trial=changed, metrics={f"loss_{step}": found.loss[step] for step in shown})


SECTION = Section(
    "Greedy coordinate gradient",
    "arXiv 2307.15043",
    "To the right more tokens are inserted into the prompt: an attack that anybody can type, where soft tokens belong "
    "to no word.",
)
ATTACK = Attack(Config, attack, inside=True, section=SECTION)
