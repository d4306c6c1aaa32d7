"""How sure a model is of true answers, and how far an answer that begins wrongly misleads it.

All is read on the letters of the second half of the first answer block, the first half being given: as it is true, with
some letters false, or with tokens at the same places that are no letters. What is read are the same letters each time,
so that only what was given can make a difference; and as a letter of an answer follows from the letter of the text at
its own place, nothing that was given says what they are.

References:
    Kumar (2024), arXiv 2409.19476: perplexity, entropy and probability of answers, and knowledge drift.

Fidelity:
    Theirs are answers that a model wrote, after false or random facts in the prompt; here it is given the true answer,
    changed in its first half. Their entropy is over the ten likeliest tokens, here over all. They tell right answers
    from wrong ones, here letters; perplexity and probability of wrong ones are those of the truth, not of what the
    model would have said. A perplexity is of the letters of all prompts together, as that of a corpus: a mean of the
    prompts' own would hang on the few worst.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsafety import losses
from jaxsafety.config.fields import check, static
from jaxsafety.entry.annotations import checked
from jaxsafety.entry.checks import check_between
from jaxsafety.linalg.masked import averaged
from jaxsafety.types import Analysis, Coordinate, Key, Measured, Section, Trial, View

CONTEXTS = ("true", "false", "random")
# Prompts that are read at once, which changes memory and no number; how far apart the marks of a row are.
_BATCH, _APART = 64, 0.24


@dataclass(frozen=True)
class Config:
    """How much of an answer is changed.

    Attributes:
        corrupted: letters of the first half that are replaced, at random places; all of them where there are fewer.
    """

    corrupted: int = static(3, at_least=1)
    __post_init__ = check


@checked
def perplexity(logprobs: Float[Array, "*b t"], mask: Bool[Array, "*b t"]) -> Float[Array, "*b"]:
    """Perplexity ``exp(-(1/T) sum log p)`` of the T tokens that ``mask`` keeps, at least 1; NaN where it keeps none."""
    return jnp.exp(-averaged(logprobs, mask))


@checked
def halves(
    letters: Bool[Array, "b t"], *, count: int | Int[Array, ""], key: Key
) -> tuple[Bool[Array, "b t"], Bool[Array, "b t"]]:
    """Random places in the first half of the marked ones of every row, and all of its second half.

    The one in the middle of an odd number belongs to the second half. ``count`` may be traced; a first half that has no
    more than ``count`` places is chosen whole.

    Raises:
        ValueError: a count below 0.
    """
    check_between("count", count, 0)
    first = letters & (jnp.cumsum(letters, axis=1) <= jnp.sum(letters, axis=1, keepdims=True) // 2)
    # Others come last.
    drawn = jnp.where(first, jax.random.uniform(key, letters.shape), 2.0)
    # Counted, as argsort aborts XLA's GSPMD partitioner where lanes are shared out over devices.
    rank = jnp.sum(drawn[:, None, :] < drawn[:, :, None], axis=-1)
    return first & (rank < count), letters & ~first


@checked
def replaced(
    tokens: Int[Array, "b t"], places: Bool[Array, "b t"], *, by: Bool[Array, " v"], key: Key
) -> Int[Array, "b t"]:
    """Tokens with others in marked places: each drawn among those that ``by`` marks but the one that stood there.

    A token stays where there is no other. Draws are uniform.
    """
    others = by[None, None] & ~jax.nn.one_hot(tokens, by.shape[0], dtype=bool)
    drawn = jax.random.categorical(key, jnp.where(others, 0.0, -jnp.inf), axis=-1).astype(tokens.dtype)
    return jnp.where(places & jnp.any(others, axis=-1), drawn, tokens)


def measure(view: View, config: Config, *, key: Key) -> Measured:
    """Returns perplexity, entropy (nats) and probability of true letters by condition and context, of all and of those
    that the model has right or wrong; the share that it has right, and that of the prompts of which it has all."""
    trials = view.trials
    shapes = jax.eval_shape(view.model.apply, view.params, trials.complied.tokens[0])
    given = partial(_given, count=config.corrupted, size=shapes.logits.shape[-1])
    tokens, read = jax.lax.map(lambda one: given(*one), (trials, jax.random.split(key, trials.last.shape[0])))
    read, targets = (jnp.broadcast_to(one[:, None], tokens.shape) for one in (read, trials.complied.targets))
    logprobs, entropies, right = _said(view, tokens, targets)
    whole = losses.exact_match(right, read)
    # Letters of all prompts side by side, [c, context, b * t].
    logprobs, entropies, right, letters = (
        one.reshape(*one.shape[:2], -1) for one in (logprobs, entropies, right, read)
    )
    found = {"accuracy": averaged(right, letters), "exact_match": averaged(whole, read.any(axis=-1))}
    for ending, kept in {"": letters, "_right": letters & right, "_wrong": letters & ~right}.items():
        found[f"perplexity{ending}"] = perplexity(logprobs, kept)
        found[f"entropy{ending}"] = averaged(entropies, kept)
        found[f"probability{ending}"] = averaged(jnp.exp(logprobs), kept)
    return {(name, "condition context"): values for name, values in found.items()}


def _given(trial: Trial, key: Key, *, count: int, size: int) -> tuple[Int[Array, "context b t"], Bool[Array, "b t"]]:
    """Inputs of one condition in every context, and the targets that are read: the same in all of them."""
    tokens, keys = trial.complied.tokens, jax.random.split(key, len(CONTEXTS))
    block = trial.blocks[:, 0] & trial.complied.mask
    # Its last one is the stop.
    letters = block & (jnp.cumsum(block, axis=1) < jnp.sum(block, axis=1, keepdims=True))
    chosen, read = halves(letters, count=count, key=keys[0])
    # Target i is token i + 1.
    places, answer = (jnp.pad(one, ((0, 0), (1, 0)))[:, :-1] for one in (chosen, letters))
    index, last = jnp.arange(tokens.shape[1])[None, :], trial.last[:, None]
    text = (index < last) & (index >= last - trial.prompt.length[:, None])
    known = _among(tokens, answer | text, size=size)
    # Operators and marks: a model has met them, unlike some of a vocabulary, and they say nothing about a letter.
    others = _among(tokens, index <= last, size=size) & ~known
    drawn = [replaced(tokens, places, by=by, key=own) for by, own in zip((known, others), keys[1:], strict=True)]
    return jnp.stack([tokens, *drawn]), read


def _among(tokens: Int[Array, "b t"], mask: Bool[Array, "b t"], *, size: int) -> Bool[Array, " v"]:
    """Which tokens stand in marked places."""
    return jnp.zeros(size, bool).at[jnp.where(mask, tokens, size)].set(True, mode="drop")


def _said(view: View, tokens: Int[Array, "*c b t"], targets: Int[Array, "*c b t"]) -> tuple[Array, Array, Array]:
    """Of every target its log-probability, the entropy there, and whether it is the likeliest token."""
    size = math.gcd(_BATCH, tokens.shape[-2])

    def batch(given: tuple[Int[Array, "b t"], Int[Array, "b t"]]) -> tuple[Array, Array, Array]:
        logits = view.model.apply(view.params, given[0]).logits
        return losses.token_logprobs(logits, given[1]), losses.entropy(logits), losses.correct(logits, given[1])

    rows = tuple(one.reshape(-1, size, one.shape[-1]) for one in (tokens, targets))
    return jax.tree.map(lambda one: one.reshape(tokens.shape), jax.lax.map(batch, rows))


def draw(table: Any, plot: Any) -> Any:
    """Accuracy, probability, perplexity and entropy of a model a row, a mark a context: of safe prompts, if there."""
    rows = plot.needed(plot.pick(table, analysis="uncertainty", condition=tuple(plot.SIDES)), "uncertainty")
    condition = next(name for name in plot.SIDES if name in rows["condition"])
    rows, models = plot.pick(rows, condition=condition), plot.models_of(rows)
    heads = {"accuracy": "accuracy", "probability": "probability", "entropy": "entropy (nats)",
             "perplexity": "perplexity (log)"}  # fmt: skip
    styles = {f"{name} start": plot.dot(style) for name, style in zip(CONTEXTS, plot.CURVES, strict=False)}

    def draw(figure: Any) -> None:
        grid = figure.subplots(2, 2, sharey=True).ravel()
        for axes, (metric, title) in zip(grid, heads.items(), strict=True):
            for side, (context, style) in enumerate(zip(CONTEXTS, styles.values(), strict=True)):
                for place, model in enumerate(models):
                    shown = plot.pick(plot.of_model(rows, model), metric=metric, part=context)
                    plot.draw_dot(axes, place + _APART * (side - 1), shown, style=style)
            axes.set_title(title)
            axes.grid(visible=True, axis="y")
            plot.dot_rows(axes, [plot.model_label(model) for model in models])
        grid[-1].set_xscale("log")
        plot.log_ticks(grid[-1].xaxis, most=4)
        plot.axis_titles(figure, x=f"true answers to {condition} prompts, letters of the second half")
        plot.legend(figure, styles, columns=3)

    height = 2 * (46 + 24 * len(models)) + 30 + plot.legend_height(styles, columns=3)
    return plot.Picture(draw, height, "uncertainty of true answers, by how they start")


SECTION = Section(
    "Uncertainty, and answers that begin wrongly",
    "beyond the paper",
    "Letters of the second half of true answers, whose first half was given as it is, with false letters, or with "
    "tokens that are no letters: the further the marks of a model lie apart, the more it goes by what was given rather "
    "than by the text.",
    draw,
    claims=("false_context", "uncertain_entropy", "uncertain_perplexity"),
)
ANALYSIS = Analysis(Config, measure, axes=lambda config: {"context": Coordinate("part", CONTEXTS)}, section=SECTION)
